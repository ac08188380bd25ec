"""Blocks of the VQGAN CNN, and the input checks that encoders and decoders share.

Blocks map `(b, channels, h, w)` to the same layout; only the ends of the networks are channel-last.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def check_sizes(owner: nn.Module, **sizes: int) -> None:
    """Refuses constructor arguments that are not positive integers.

    Raises:
        ValueError: If a size is zero, negative or not an integer.
    """
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"{type(owner).__name__} needs `{name}` to be a positive integer, got {size!r}"
            )


def check_odd(owner: nn.Module, **sizes: int) -> None:
    """Refuses kernels without a middle.

    Raises:
        ValueError: If a size is even.
    """
    for name, size in sizes.items():
        if size % 2 == 0:
            raise ValueError(
                f"{type(owner).__name__} needs an odd `{name}`, got {size}: an even kernel would "
                "shift the tokens by half a place"
            )


def checked_multipliers(owner: nn.Module, multipliers: Sequence[int]) -> tuple[int, ...]:
    """The multipliers of the channels as a tuple.

    Raises:
        ValueError: If there is none, or one is not a positive integer.
    """
    multipliers = tuple(multipliers)
    if not multipliers or not all(isinstance(m, int) and m > 0 for m in multipliers):
        raise ValueError(
            f"{type(owner).__name__} needs `multipliers` to be positive integers, one for each "
            f"resolution, got {multipliers}; VQ-16 has (1, 1, 2, 2, 4)"
        )
    return multipliers


def check_images(owner: nn.Module, images: Tensor, channels: int, stride: int) -> None:
    """Refuses anything but floating-point images `(b, channels, H, W)` that `stride` divides.

    Raises:
        ValueError: If the layout, the dtype or the size does not fit.
    """
    name, shape = type(owner).__name__, tuple(images.shape)
    if images.ndim == 4 and shape[1] != channels and shape[3] == channels:
        raise ValueError(
            f"{name} expects channel-first images (b, {channels}, H, W), got shape {shape}; "
            "move the channels with images.permute(0, 3, 1, 2)"
        )
    if images.ndim != 4 or shape[1] != channels:
        raise ValueError(
            f"{name} expects images (b, {channels}, H, W), got shape {shape}; "
            "add a batch axis with images[None], or build it with another `image_channels`"
        )
    if not images.is_floating_point():
        raise ValueError(
            f"{name} expects floating-point images in [-1, 1], got {images.dtype}; "
            "bytes become that with images / 127.5 - 1"
        )
    height, width = shape[2:]
    if height < 1 or width < 1 or height % stride or width % stride:
        raise ValueError(
            f"{name} needs a height and width that are multiples of its stride {stride}, "
            f"got {(height, width)}; crop or pad the images, "
            f"as xq.images.pad_to_multiple(images, {stride}) does"
        )


def check_tokens(owner: nn.Module, tokens: Tensor, dim: int) -> None:
    """Refuses anything but floating-point tokens `(b, h, w, dim)`.

    Raises:
        ValueError: If the layout or the dtype does not fit.
    """
    name, shape = type(owner).__name__, tuple(tokens.shape)
    if tokens.ndim != 4 or shape[3] != dim:
        raise ValueError(
            f"{name} expects channel-last tokens (b, h, w, {dim}), got shape {shape}; move the "
            "channels last, give flat tokens their grid, or build it with another `dim`"
        )
    if not tokens.is_floating_point():
        raise ValueError(
            f"{name} expects floating-point tokens, got {tokens.dtype}; "
            "indices become tokens with quantizer.decode(indices)"
        )
    if 0 in shape[1:3]:
        raise ValueError(f"{name} needs at least one token, got shape {shape}")


def norm(channels: int) -> nn.GroupNorm:
    """Group normalization in 32 groups, or in the largest number below that divides `channels`."""
    groups = next(groups for groups in range(32, 0, -1) if channels % groups == 0)
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut, each after a normalization and a SiLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; where they differ, the shortcut is a 1x1 convolution.
        bias: Whether the convolutions have one.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=bias)
        self.nin_shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1, bias=bias)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions, around a shortcut.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        normed = self.norm(x)
        # the fused kernels want an axis of heads, here of one, and channels that lie together
        projected = (self.q(normed), self.k(normed), self.v(normed))
        q, k, v = (t.flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for t in projected)
        attended = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + self.proj_out(attended.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """Halves height and width with a convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        # padded at the right and the bottom only, as in VQGAN: symmetric padding shifts by a pixel
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, then the step to the next.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        blocks: Number of residual blocks.
        attention: Whether an attention follows each residual block.
        downsample: Whether the level ends by halving the resolution.
        upsample: Whether the level ends by doubling it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: int,
        *,
        attention: bool = False,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        inputs = [in_channels] + [out_channels] * (blocks - 1)
        self.res = nn.ModuleList(ResidualBlock(channels, out_channels) for channels in inputs)
        self.attn = nn.ModuleList(
            AttentionBlock(out_channels) if attention else nn.Identity() for _ in inputs
        )
        self.downsample = Downsample(out_channels) if downsample else nn.Identity()
        self.upsample = Upsample(out_channels) if upsample else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        for res, attn in zip(self.res, self.attn, strict=True):
            x = attn(res(x))
        return self.upsample(self.downsample(x))


def middle(channels: int, *, attention: bool = True) -> nn.Sequential:
    """The blocks at the lowest resolution, between the levels and the tokens."""
    first, last = (ResidualBlock(channels, channels) for _ in range(2))
    return nn.Sequential(first, AttentionBlock(channels) if attention else nn.Identity(), last)
