"""The encoder and decoder of Open-MAGVIT2: convolutions alone, and a decoder with a style."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.models.cnn_blocks import (
    ResidualBlock,
    check_images,
    check_sizes,
    check_tokens,
    checked_multipliers,
    norm,
)


class MAGVIT2Encoder(nn.Module):
    """Images to a grid of tokens by residual blocks without attention.

    Luo et al. 2024, Open-MAGVIT2, section 3.1, after Yu et al. 2024, MAGVIT-v2, appendix A; the
    defaults are its model for 256 x 256 images, with 18 channels for `LFQ(18)`. It halves the
    resolution by a convolution padded on all sides, has no bias in residual blocks and at the
    input, and gives the quantizer's channels itself.

    Args:
        dim: Channels of a token, those of the quantizer.
        channels: Channels at full resolution.
        multipliers: Channels of each level, as multiples of `channels`; the resolution halves
            from each level to the next.
        blocks: Residual blocks of a level, and of the middle.
        image_channels: Channels of the images.

    Raises:
        ValueError: If a size is not a positive integer or `multipliers` is empty.
    """

    def __init__(
        self,
        dim: int,
        *,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 4,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        check_sizes(self, dim=dim, channels=channels, blocks=blocks, image_channels=image_channels)
        self.multipliers = checked_multipliers(self, multipliers)
        self.dim, self.channels, self.blocks = dim, channels, blocks
        self.image_channels = image_channels
        widths = [channels * multiplier for multiplier in self.multipliers]
        self.conv_in = nn.Conv2d(image_channels, channels, 3, padding=1, bias=False)
        self.conv_blocks = nn.ModuleList(
            _Down(before, width, blocks, downsample=i < len(widths) - 1)
            for i, (before, width) in enumerate(zip([channels, *widths], widths, strict=False))
        )
        self.mid = _residuals(widths[-1], widths[-1], blocks)
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], dim, 1)

    @property
    def stride(self) -> int:
        """Side of the square of pixels that becomes one token."""
        return 2 ** (len(self.multipliers) - 1)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return _config(self)

    def forward(self, images: Shaped[Tensor, "..."]) -> Float[Tensor, "b h w dim"]:
        """Encodes images `(b, image_channels, H, W)` in [-1, 1]; the stride divides `H` and `W`.

        Raises:
            ValueError: If the images are not channel-first, not floating-point or of another size.
        """
        check_images(self, images, self.image_channels, self.stride)
        x = self.conv_in(images)
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x)))).permute(0, 2, 3, 1)


class MAGVIT2Decoder(nn.Module):
    """A grid of tokens to images; what all tokens have in common scales and shifts each level.

    Luo et al. 2024, Open-MAGVIT2, section 3.1, after MAGVIT-v2's adaptive group normalization. Each
    level starts with a normalization whose scale and shift are linear in the standard deviation and
    the mean of each token channel over the grid; it ends in a convolution to four times the
    channels that become four pixels. As a standard deviation needs two tokens, so does the decoder.
    The output is not clamped.

    Args:
        dim: Channels of a token, those of the quantizer.
        channels: Channels at full resolution.
        multipliers: Channels of each level, as multiples of `channels`, in the encoder's order.
        blocks: Residual blocks of a level, and of the middle.
        image_channels: Channels of the images.

    Raises:
        ValueError: If a size is not a positive integer or `multipliers` is empty.
    """

    def __init__(
        self,
        dim: int,
        *,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 4,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        check_sizes(self, dim=dim, channels=channels, blocks=blocks, image_channels=image_channels)
        self.multipliers = checked_multipliers(self, multipliers)
        self.dim, self.channels, self.blocks = dim, channels, blocks
        self.image_channels = image_channels
        widths = [channels * multiplier for multiplier in reversed(self.multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(dim, widths[0], 3, padding=1)
        self.mid = _residuals(widths[0], widths[0], blocks)
        self.conv_blocks = nn.ModuleList(
            _Up(dim, before, width, blocks, upsample=i < last)
            for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], image_channels, 3, padding=1)

    @property
    def stride(self) -> int:
        """Side of the square of pixels that one token becomes."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def last_layer(self) -> Tensor:
        """The last convolution's weight, where adaptive GAN weights compare gradients."""
        return self.conv_out.weight

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON."""
        return _config(self)

    def forward(self, tokens: Shaped[Tensor, "..."]) -> Float[Tensor, "b image_channels H W"]:
        """Decodes tokens `(b, h, w, dim)`, of any grid of two tokens or more.

        Raises:
            ValueError: If the tokens are not a channel-last grid of `dim` channels, or but one.
        """
        check_tokens(self, tokens, self.dim)
        if tokens.shape[1] * tokens.shape[2] < 2:
            raise ValueError(
                "MAGVIT2Decoder needs two tokens or more, whose standard deviation it takes, got "
                f"shape {tuple(tokens.shape)}; encode a larger image"
            )
        z = tokens.permute(0, 3, 1, 2)
        x = self.mid(self.conv_in(z))
        for level in self.conv_blocks:
            x = level(x, z)
        return self.conv_out(F.silu(self.norm_out(x)))


class AdaptiveNorm(nn.Module):
    """Group normalization whose scale and shift come from the statistics of another map.

    Args:
        dim: Channels of the other map.
        channels: Channels that are normalized.
    """

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.groups = norm(channels).num_groups
        self.gamma = nn.Linear(dim, channels)
        self.beta = nn.Linear(dim, channels)

    def forward(
        self, x: Float[Tensor, "b c h w"], style: Float[Tensor, "b dim y x"]
    ) -> Float[Tensor, "b c h w"]:
        flat = style.flatten(2)
        mean = flat.mean(-1, keepdim=True)
        # unbiased, as in Open-MAGVIT2; `var` warns about an empty batch
        variance = (flat - mean).square().sum(-1) / (flat.shape[-1] - 1)
        scale, shift = self.gamma((variance + 1e-6).sqrt()), self.beta(mean[..., 0])
        normed = F.group_norm(x, self.groups, eps=1e-6)
        return scale[..., None, None] * normed + shift[..., None, None]


class _Down(nn.Module):
    """The blocks of one resolution, then half of it."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, *, downsample: bool
    ) -> None:
        super().__init__()
        self.res = _residuals(in_channels, out_channels, blocks)
        self.downsample = (
            nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
            if downsample
            else nn.Identity()
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return self.downsample(self.res(x))


class _Up(nn.Module):
    """The style and the blocks of one resolution, then twice of it."""

    def __init__(
        self, dim: int, in_channels: int, out_channels: int, blocks: int, *, upsample: bool
    ) -> None:
        super().__init__()
        self.adaptive = AdaptiveNorm(dim, in_channels)
        self.res = _residuals(in_channels, out_channels, blocks)
        self.upsample = DepthToSpace(out_channels) if upsample else nn.Identity()

    def forward(
        self, x: Float[Tensor, "b c h w"], style: Float[Tensor, "b dim y x"]
    ) -> Float[Tensor, "b d h2 w2"]:
        return self.upsample(self.res(self.adaptive(x, style)))


class DepthToSpace(nn.Module):
    """Doubles height and width: a convolution to four times the channels, which become pixels.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return F.pixel_shuffle(self.conv(x), 2)


def _residuals(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    inputs = [in_channels] + [out_channels] * (blocks - 1)
    return nn.Sequential(*(ResidualBlock(width, out_channels, bias=False) for width in inputs))


def _config(module: MAGVIT2Encoder | MAGVIT2Decoder) -> dict[str, Any]:
    return {
        "dim": module.dim,
        "channels": module.channels,
        "multipliers": list(module.multipliers),
        "blocks": module.blocks,
        "image_channels": module.image_channels,
    }
