"""Plain transformers on patches, a token for each: ViT-VQGAN and BSQ-ViT."""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.models.cnn_blocks import check_sizes, check_tokens
from xq.models.sizes import Size, check_fixed_images, checked_grid, checked_pair, plain_size
from xq.models.transformer import Transformer, check_heads, init_linear_


class _PatchPart(nn.Module):
    """What encoder and decoder share: sizes, positions and the transformer."""

    def __init__(
        self,
        dim: int,
        *,
        image_size: Size,
        patch_size: Size,
        width: int,
        depth: int,
        heads: int,
        checkpointing: bool,
        image_channels: int,
    ) -> None:
        super().__init__()
        check_sizes(
            self, dim=dim, width=width, depth=depth, heads=heads, image_channels=image_channels
        )
        check_heads(self, width, heads)
        self.dim, self.width, self.depth, self.heads = dim, width, depth, heads
        self.checkpointing, self.image_channels = checkpointing, image_channels
        self.image_size = checked_pair(self, "image_size", image_size)
        self.patch_size = checked_pair(self, "patch_size", patch_size)
        self.grid = checked_grid(self, self.image_size, self.patch_size)
        self.positions = nn.Parameter(torch.empty(self.grid[0] * self.grid[1], width))
        self.transformer = Transformer(width, depth, heads, checkpointing=checkpointing)

    @property
    def patch_numbers(self) -> int:
        """Numbers in a patch, over its pixels and channels."""
        return self.image_channels * self.patch_size[0] * self.patch_size[1]

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return {
            "dim": self.dim,
            "image_size": plain_size(self.image_size),
            "patch_size": plain_size(self.patch_size),
            "width": self.width,
            "depth": self.depth,
            "heads": self.heads,
            "checkpointing": self.checkpointing,
            "image_channels": self.image_channels,
        }

    def _start(self) -> None:
        init_linear_(self)
        nn.init.normal_(self.positions, std=0.02)


class PatchEncoder(_PatchPart):
    """Images to a grid of tokens, one for each patch, through a plain transformer.

    ViT-VQGAN (Yu et al. 2022, section 3.1) and BSQ-ViT (Zhao et al. 2024, section 4): a linear map
    of each patch, learned positions, blocks, a linear map to the quantizer's channels (the papers'
    factorized codes). `feedforward` puts ViT-VQGAN's two layers with a tanh between them before
    that map; BSQ-ViT has them in its decoder alone. The normalization before the first block is
    BSQ-ViT's, the paper of ViT-VQGAN does not speak of one. Defaults are BSQ-ViT's.

    Args:
        dim: Channels of a token, those of the quantizer.
        image_size: Of images, a side or (height, width); learned positions fix it.
        patch_size: Of patches, likewise.
        width: Channels within the transformer.
        depth: Blocks.
        heads: Heads of attention.
        feedforward: Whether the blocks end in two layers with a tanh, of four times the width.
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
        patch_size: Size = 8,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        feedforward: bool = False,
        checkpointing: bool = False,
        image_channels: int = 3,
    ) -> None:
        super().__init__(
            dim,
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            depth=depth,
            heads=heads,
            checkpointing=checkpointing,
            image_channels=image_channels,
        )
        # positions are its bias
        self.patches = nn.Linear(self.patch_numbers, width, bias=False)
        self.feedforward = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, width))
            if feedforward
            else None
        )
        self.to_tokens = nn.Linear(width, dim)
        self._start()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: `PatchEncoder(**encoder.config())`."""
        return super().config() | {"feedforward": self.feedforward is not None}

    def forward(self, images: Shaped[Tensor, "..."]) -> Float[Tensor, "b h w dim"]:
        """Encodes images `(b, image_channels, *image_size)` in [-1, 1].

        Raises:
            ValueError: If the images are not channel-first, not floating-point or of another size.
        """
        check_fixed_images(self, images, self.image_channels, self.image_size)
        p, q = self.patch_size
        x = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)
        x = self.transformer(self.patches(x) + self.positions)
        if self.feedforward is not None:
            x = self.feedforward(x)
        return self.to_tokens(x).unflatten(1, self.grid)


class PatchDecoder(_PatchPart):
    """A grid of tokens to images, a patch for each: the mirror of `PatchEncoder`.

    ViT-VQGAN (Yu et al. 2022, section 3.1) and BSQ-ViT (Zhao et al. 2024, section 4): a linear map
    from the quantizer's channels, learned positions, blocks, two layers with a tanh between them
    and four times the width. The output is neither squashed nor clamped.

    Args:
        dim: Channels of a token, those of the quantizer.
        image_size: Of images, a side or (height, width); learned positions fix it.
        patch_size: Of patches, likewise.
        width: Channels within the transformer.
        depth: Blocks.
        heads: Heads of attention.
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
        patch_size: Size = 8,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        checkpointing: bool = False,
        image_channels: int = 3,
    ) -> None:
        super().__init__(
            dim,
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            depth=depth,
            heads=heads,
            checkpointing=checkpointing,
            image_channels=image_channels,
        )
        self.from_tokens = nn.Linear(dim, width)
        self.feedforward = nn.Sequential(nn.Linear(width, 4 * width), nn.Tanh())
        self.pixels = nn.Linear(4 * width, self.patch_numbers)
        self._start()

    @property
    def last_layer(self) -> Tensor:
        """The weight that makes pixels, where adaptive GAN weights compare gradients."""
        return self.pixels.weight

    def forward(self, tokens: Shaped[Tensor, "..."]) -> Float[Tensor, "b image_channels H W"]:
        """Decodes tokens `(b, h, w, dim)` of the grid of patches.

        Raises:
            ValueError: If the tokens are not a channel-last grid of that size and `dim` channels.
        """
        check_tokens(self, tokens, self.dim)
        height, width = tokens.shape[1:3]
        if (height, width) != self.grid:
            (p, q), size = self.patch_size, self.image_size
            raise ValueError(
                f"PatchDecoder is built for images of {size}, a grid of {self.grid} tokens, got "
                f"{(height, width)}; build it with image_size={(height * p, width * q)}"
            )
        x = self.transformer(self.from_tokens(tokens).flatten(1, 2) + self.positions)
        x = self.pixels(self.feedforward(x))
        (h, w), (p, q) = self.grid, self.patch_size
        return rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=h, w=w, p=p, q=q)
