"""The vision transformers of XQ-GAN: images to query tokens, tokens to images."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.backbones import PathLike
from xq.models.cnn_blocks import check_tokens
from xq.models.sizes import Size, check_fixed_images
from xq.models.vit_backbone import ViTPart, init_levels_

HEADS = ("linear", "conv")


class ViTEncoder(ViTPart):
    """Images to a grid of tokens, read out by learned queries beside the patches of a ViT.

    XQ-GAN (section 3, "SC"): for each branch of a product, a grid of queries joins the class token
    and the patches in full attention. Queries have the positions of patches, resampled to their
    grid, and the embedding of their level: 0 for the image, 1 + p for branch p. What becomes of the
    queries is projected to `dim / branches` channels, and the branches stand side by side as
    channels, so that `ProductQuantizer` splits them again.

    The linear map `quant_conv` serves all branches. XQ-GAN projects the aligned teacher with it
    too: `FeatureAlignment(teacher, dim // branches, projector=encoder.quant_conv)`.

    Without weights, most DINOv2 names begin with each block's part scaled by 1e-5, so that it takes
    long until tokens see the image; `options={"init_values": 1.0}` or "vit_base_patch16_224" is
    better from scratch. Register tokens have no positions in the models that bring them.

    Args:
        dim: Channels of the quantizer, those of all branches together.
        backbone: The name of a plain ViT in timm: DINOv2 ("vit_small_patch14_dinov2" to "giant",
            "..._reg4_dinov2"), CLIP ("vit_base_patch16_clip_224.openai"), "vit_base_patch16_224".
        image_size: Of images, a side or (height, width).
        patch_size: Of patches, likewise; kernels are resampled where the weights have another.
        tokens: Of the grid of queries, likewise.
        branches: Sets of queries, the P of the product.
        drop_path: Rate of stochastic depth of the last block (XQ-GAN: 0.1), growing from zero.
        checkpointing: Recomputes each block in the backward pass of a training step.
        image_channels: Channels of images.
        pretrained: Downloads timm's weights.
        weights: A local file of them instead.
        options: Further arguments of the model in timm, such as {"depth": 6}.

    Raises:
        FileNotFoundError: If the file of weights is missing.
        ImportError: If timm is; `pip install "xq[vision]"` brings it.
        OSError: If the download fails.
        ValueError: If a size does not fit, or timm has no such plain ViT.
    """

    def __init__(
        self,
        dim: int,
        *,
        backbone: str = "vit_base_patch14_dinov2",
        image_size: Size = 256,
        patch_size: Size = 16,
        tokens: Size = 16,
        branches: int = 1,
        drop_path: float = 0.0,
        checkpointing: bool = False,
        image_channels: int = 3,
        pretrained: bool = False,
        weights: PathLike | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if branches < 1 or dim % branches:
            raise ValueError(
                f"ViTEncoder needs `dim` to be a multiple of `branches`, got dim={dim} and "
                f"branches={branches}; dim is quantizer.dim, branches the quantizer's P"
            )
        super().__init__(
            dim,
            backbone=backbone,
            image_size=image_size,
            patch_size=patch_size,
            tokens=tokens,
            drop_path=drop_path,
            checkpointing=checkpointing,
            image_channels=image_channels,
            pretrained=pretrained,
            weights=weights,
            options=options,
        )
        self.branches = branches
        count = branches * self.tokens[0] * self.tokens[1]
        self.latent_tokens = nn.Parameter(torch.empty(1, count, self.width))
        self.lvl_embed = nn.Embedding(1 + branches, self.width)
        self.quant_conv = nn.Linear(self.width, dim // branches)
        nn.init.normal_(self.latent_tokens, std=1e-6)
        init_levels_(self.lvl_embed)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON; weights are not among them."""
        return super().config() | {"branches": self.branches}

    def forward(self, images: Shaped[Tensor, "..."]) -> Float[Tensor, "b h w dim"]:
        """Encodes images `(b, image_channels, *image_size)` in [-1, 1].

        Raises:
            ValueError: If the images are not channel-first, not floating-point or of another size.
        """
        check_fixed_images(self, images, self.image_channels, self.image_size)
        x = self.features(images)
        h, w = self.tokens
        return rearrange(self.quant_conv(x), "b (p h w) c -> b h w (p c)", h=h, w=w)

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n width"]:
        """The queries' last features before the projection, branch after branch."""
        levels = self.lvl_embed.weight
        patches = self._sequence(self.backbone.patch_embed(images), self.grid, levels[0])
        _, positions = self._positions(self.tokens)
        queries = self.latent_tokens.unflatten(1, (self.branches, -1)) + positions[:, None]
        queries = (queries + levels[1:, None]).flatten(1, 2)
        x = torch.cat([patches, queries.expand(images.shape[0], -1, -1)], dim=1)
        return self.backbone.norm(self._blocks(x)[:, -queries.shape[1] :])


class ViTDecoder(ViTPart):
    """A grid of tokens to images: the mirror of `ViTEncoder`, of any P.

    XQ-GAN (section 3, "SC"): the sequence is the class token, a mask token for each patch, the
    class token again and the projected tokens. Both grids have the backbone's positions, resampled
    for the tokens; level 0 is the image, 1 the tokens. A linear map or a transposed convolution
    makes the patches' pixels. The output is not clamped.

    Where a backbone has registers, they stand behind both class tokens. From scratch, see
    `ViTEncoder`.

    Args:
        dim: Channels of the quantizer.
        backbone: The name of a plain ViT in timm, as for `ViTEncoder`.
        image_size: Of images, a side or (height, width).
        patch_size: Of patches, likewise.
        tokens: Of the grid of tokens, likewise.
        head: "linear", or "conv", whose bias is one number a colour.
        drop_path: Rate of stochastic depth of the last block (XQ-GAN: 0.1), growing from zero.
        checkpointing: Recomputes each block in the backward pass of a training step.
        image_channels: Channels of images.
        pretrained: Downloads timm's weights.
        weights: A local file of them instead.
        options: Further arguments of the model in timm.

    Raises:
        FileNotFoundError: If the file of weights is missing.
        ImportError: If timm is; `pip install "xq[vision]"` brings it.
        OSError: If the download fails.
        ValueError: If a size does not fit, there is no such head, or timm has no such plain ViT.
    """

    def __init__(
        self,
        dim: int,
        *,
        backbone: str = "vit_base_patch14_dinov2",
        image_size: Size = 256,
        patch_size: Size = 16,
        tokens: Size = 16,
        head: str = "linear",
        drop_path: float = 0.0,
        checkpointing: bool = False,
        image_channels: int = 3,
        pretrained: bool = False,
        weights: PathLike | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if head not in HEADS:
            raise ValueError(f"ViTDecoder has the heads {', '.join(HEADS)}, got {head!r}")
        super().__init__(
            dim,
            backbone=backbone,
            image_size=image_size,
            patch_size=patch_size,
            tokens=tokens,
            drop_path=drop_path,
            checkpointing=checkpointing,
            image_channels=image_channels,
            pretrained=pretrained,
            weights=weights,
            options=options,
        )
        # its patches are masked
        self.backbone.patch_embed = nn.Identity()
        self.head = head
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.width))
        self.lvl_embed = nn.Embedding(2, self.width)
        self.post_quant_conv = nn.Linear(dim, self.width)
        height, width = self.patch_size
        self.to_pixel = (
            nn.Linear(self.width, height * width * image_channels)
            if head == "linear"
            else nn.ConvTranspose2d(
                self.width, image_channels, self.patch_size, stride=self.patch_size
            )
        )
        nn.init.normal_(self.mask_token, std=1e-6)
        init_levels_(self.lvl_embed)

    @property
    def last_layer(self) -> Tensor:
        """The pixel head's weight, where adaptive GAN weights compare gradients."""
        return self.to_pixel.weight

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON; weights are not among them."""
        return super().config() | {"head": self.head}

    def forward(self, tokens: Shaped[Tensor, "..."]) -> Float[Tensor, "b image_channels H W"]:
        """Decodes tokens `(b, *tokens, dim)`.

        Raises:
            ValueError: If the tokens are not a channel-last grid of that size and `dim` channels.
        """
        check_tokens(self, tokens, self.dim)
        if tokens.shape[1:3] != self.tokens:
            grid = tuple(tokens.shape[1:3])
            raise ValueError(
                f"ViTDecoder is built for a grid of {self.tokens} tokens, got {grid}; "
                f"build it with tokens={grid}"
            )
        (h, w), (p, q) = self.grid, self.patch_size
        levels = self.lvl_embed.weight
        masks = self.mask_token.expand(tokens.shape[0], h * w, -1)
        masks = self._sequence(masks, self.grid, levels[0])
        x = self._sequence(self.post_quant_conv(tokens).flatten(1, 2), self.tokens, levels[1])
        x = self._blocks(torch.cat([masks, x], dim=1))
        first = masks.shape[1] - h * w
        x = self.backbone.norm(x[:, first : first + h * w])
        if self.head == "conv":
            return self.to_pixel(rearrange(x, "b (h w) d -> b d h w", h=h))
        x = self.to_pixel(x)
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=h, p=p, q=q)
