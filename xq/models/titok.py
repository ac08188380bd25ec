"""TiTok: images as a short row of tokens, which have no place in the image."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.models.cnn_blocks import check_sizes
from xq.models.sizes import Size, check_fixed_images, checked_grid, checked_pair, plain_size
from xq.models.titok_pixels import CodePixels, MaskGITDecoder, PatchPixels
from xq.models.transformer import Transformer, check_heads, init_linear_


class _TiTokPart(nn.Module):
    """What encoder and decoder share: sizes, positions, the class token and the transformer."""

    def __init__(
        self,
        dim: int,
        *,
        image_size: Size,
        patch_size: Size,
        tokens: int,
        width: int,
        depth: int,
        heads: int,
        checkpointing: bool,
        image_channels: int,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "tokens": tokens, "width": width, "depth": depth, "heads": heads}
        check_sizes(self, **sizes, image_channels=image_channels)
        check_heads(self, width, heads)
        self.dim, self.tokens = dim, tokens
        self.width, self.depth, self.heads = width, depth, heads
        self.checkpointing, self.image_channels = checkpointing, image_channels
        self.image_size = checked_pair(self, "image_size", image_size)
        self.patch_size = checked_pair(self, "patch_size", patch_size)
        self.grid = checked_grid(self, self.image_size, self.patch_size)
        self.class_token = _parameter(1, width)
        self.positions = _parameter(1 + self.grid[0] * self.grid[1], width)
        self.token_positions = _parameter(tokens, width)
        self.transformer = Transformer(width, depth, heads, checkpointing=checkpointing)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {
            "dim": self.dim,
            "image_size": plain_size(self.image_size),
            "patch_size": plain_size(self.patch_size),
            "tokens": self.tokens,
            "width": self.width,
            "depth": self.depth,
            "heads": self.heads,
            "checkpointing": self.checkpointing,
            "image_channels": self.image_channels,
        }

    def _sequence(
        self, patches: Float[Tensor, "b n width"], tokens: Float[Tensor, "b m width"]
    ) -> Float[Tensor, "b l width"]:
        """The class token, the patches and the tokens, each with its position."""
        first = self.class_token.expand(patches.shape[0], -1, -1)
        patches = torch.cat([first, patches], dim=1) + self.positions
        return torch.cat([patches, tokens + self.token_positions], dim=1)


class TiTokEncoder(_TiTokPart):
    """Images to a row of tokens: latent tokens that attend to the patches of a ViT.

    TiTok (Yu et al. 2024, section 3.2). A class token, the patches and the latent tokens pass
    through the transformer; the latent tokens' features become the quantizer's channels. Images are
    in [-1, 1] as everywhere here, and taken to the original's [0, 1] within.

    The three models of the paper read the (tokens, width) features as if they were (width, tokens)
    before the last linear map, without a transposition: each token of the quantizer then has parts
    of several latent tokens. Their weights need `mixed=True`; the later "vq8k" ones do without.

    Args:
        dim: Channels of a token, those of the quantizer.
        image_size: Of images, a side or (height, width); learned positions fix it.
        patch_size: Of patches, likewise.
        tokens: How many tokens an image has.
        width: Channels within the transformer.
        depth: Blocks.
        heads: Heads of attention.
        mixed: Whether tokens are mixed as above, for weights that were trained so.
        checkpointing: Recomputes each block in the backward pass of a training step.
        image_channels: Channels of images.

    Raises:
        ValueError: If a size is not positive, patches do not cover the image, or `heads` does not
            divide `width`.
    """

    def __init__(
        self,
        dim: int,
        *,
        image_size: Size = 256,
        patch_size: Size = 16,
        tokens: int = 32,
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        mixed: bool = False,
        checkpointing: bool = False,
        image_channels: int = 3,
    ) -> None:
        super().__init__(
            dim,
            image_size=image_size,
            patch_size=patch_size,
            tokens=tokens,
            width=width,
            depth=depth,
            heads=heads,
            checkpointing=checkpointing,
            image_channels=image_channels,
        )
        self.mixed = mixed
        p, q = self.patch_size
        self.patches = nn.Linear(image_channels * p * q, width)
        self.latent_tokens = _parameter(tokens, width)
        self.to_tokens = nn.Linear(width, dim)
        init_linear_(self)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: `TiTokEncoder(**encoder.config())`."""
        return super().config() | {"mixed": self.mixed}

    def forward(self, images: Shaped[Tensor, "..."]) -> Float[Tensor, "b tokens dim"]:
        """Encodes images `(b, image_channels, *image_size)` in [-1, 1].

        Raises:
            ValueError: If the images are not channel-first, not floating-point or of another size.
        """
        check_fixed_images(self, images, self.image_channels, self.image_size)
        p, q = self.patch_size
        x = rearrange((images + 1) / 2, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)
        x = self._sequence(self.patches(x), self.latent_tokens.expand(x.shape[0], -1, -1))
        x = self.transformer(x, start=len(self.positions))
        if self.mixed:
            x = x.reshape(-1, self.width, self.tokens).transpose(1, 2)
        return self.to_tokens(x)


class TiTokDecoder(_TiTokPart):
    """A row of tokens to images: mask tokens that attend to them become the patches.

    TiTok (Yu et al. 2024, section 3.2). A class token, a mask token for each patch and the tokens
    pass through the transformer. The patches' features become pixels at once, or, as in the paper's
    models, logits over the codes of a VQGAN whose decoder makes the image. What the head makes in
    [0, 1] is taken to [-1, 1]; it is not clamped.

    Args:
        dim: Channels of a token, those of the quantizer.
        image_size: Of images, a side or (height, width); learned positions fix it.
        patch_size: Of patches, likewise.
        tokens: How many tokens an image has.
        width: Channels within the transformer.
        depth: Blocks.
        heads: Heads of attention.
        vqgan: Makes images of logits, `MaskGITDecoder()`; None for pixels at once.
        checkpointing: Recomputes each block in the backward pass of a training step.
        image_channels: Channels of images.

    Raises:
        ValueError: If a size is not positive, patches do not cover the image, `heads` does not
            divide `width`, or a patch or a colour is not what `vqgan` makes of a code.
    """

    def __init__(
        self,
        dim: int,
        *,
        image_size: Size = 256,
        patch_size: Size = 16,
        tokens: int = 32,
        width: int = 1024,
        depth: int = 24,
        heads: int = 16,
        vqgan: MaskGITDecoder | None = None,
        checkpointing: bool = False,
        image_channels: int = 3,
    ) -> None:
        super().__init__(
            dim,
            image_size=image_size,
            patch_size=patch_size,
            tokens=tokens,
            width=width,
            depth=depth,
            heads=heads,
            checkpointing=checkpointing,
            image_channels=image_channels,
        )
        self.mask_token = _parameter(1, width)
        self.from_tokens = nn.Linear(dim, width)
        init_linear_(self)
        if vqgan is None:
            self.head = PatchPixels(width, self.patch_size, image_channels)
        else:
            self._check_vqgan(vqgan)
            self.head = CodePixels(width, vqgan)

    def _check_vqgan(self, vqgan: MaskGITDecoder) -> None:
        made = (vqgan.stride, vqgan.stride, vqgan.image_channels)
        wanted = (*self.patch_size, self.image_channels)
        if made != wanted:
            raise ValueError(
                f"TiTokDecoder needs a vqgan that makes a patch of (height, width, channels) "
                f"{wanted} from each code, got one for {made}; its multipliers set its stride"
            )

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes pixels, where adaptive GAN weights compare gradients."""
        return self.head.last_layer

    def config(self) -> dict[str, Any]:
        """The constructor's arguments: `TiTokDecoder(**decoder.config())`."""
        vqgan = self.head.vqgan if isinstance(self.head, CodePixels) else None
        return super().config() | {"vqgan": vqgan}

    def forward(self, tokens: Shaped[Tensor, "..."]) -> Float[Tensor, "b image_channels H W"]:
        """Decodes tokens `(b, tokens, dim)`.

        Raises:
            ValueError: If the tokens are not so many, not channel-last or not floating-point.
        """
        self._check_tokens(tokens)
        (h, w), (b, *_) = self.grid, tokens.shape
        masks = self.mask_token.expand(b, h * w, -1)
        x = self._sequence(masks, self.from_tokens(tokens))
        x = self.transformer(x, start=1, count=h * w)
        return 2 * self.head(x.unflatten(1, (h, w))) - 1

    def _check_tokens(self, tokens: Tensor) -> None:
        shape = tuple(tokens.shape)
        if tokens.ndim != 3 or shape[1:] != (self.tokens, self.dim):
            raise ValueError(
                f"TiTokDecoder expects tokens (b, {self.tokens}, {self.dim}), got shape {shape}; "
                "its tokens are a row without height and width, channels last"
            )
        if not tokens.is_floating_point():
            raise ValueError(
                f"TiTokDecoder expects floating-point tokens, got {tokens.dtype}; "
                "indices become tokens with quantizer.decode(indices)"
            )


def _parameter(rows: int, width: int) -> nn.Parameter:
    """Learned vectors, of unit length or so at the start."""
    parameter = nn.Parameter(torch.empty(rows, width))
    nn.init.normal_(parameter, std=width**-0.5)
    return parameter
