"""The convolutional encoder and decoder of VQGAN, with channel-last tokens between them."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from xq.models.cnn_blocks import (
    Level,
    check_images,
    check_odd,
    check_sizes,
    check_tokens,
    checked_multipliers,
    middle,
    norm,
)


class CNNEncoder(nn.Module):
    """Images to a grid of tokens, one token for each `stride` x `stride` pixels.

    Esser et al. 2021, VQGAN; sizes as in LlamaGen (Sun et al. 2024): the defaults are its VQ-16,
    `multipliers=(1, 2, 2, 4)` its VQ-8. Unlike there, the convolution to the quantizer's
    channels (`quant_conv`) is part of the encoder, and the output is channel-last. Attention stands
    at the lowest resolution only. Normalization has 32 groups where these divide the channels, else
    the most that do: up to 32 channels, each is normalized alone. Other sizes make it the encoder
    of VAR, RQ-VAE and IBQ: see the presets.

    Args:
        dim: Channels of a token, those of the quantizer.
        channels: Channels at full resolution.
        multipliers: Channels of each level, as multiples of `channels`; the resolution halves
            from each level to the next.
        blocks: Residual blocks of a level.
        z_channels: Channels before the last convolution, to `dim`.
        quant_kernel: Side of that convolution's kernel, odd: 1, in VAR 3.
        patch: Side of the pixel blocks that are folded into channels before the first convolution;
            1 is VQGAN, 4 makes networks small enough to train on a CPU.
        image_channels: Channels of the images.
        attention: Whether there is any. Without, time grows with the pixels of an image, not with
            their square, and a token sees its surroundings alone.

    Raises:
        ValueError: If a size is not a positive integer, `quant_kernel` is even or `multipliers` is
            empty.

    Examples:
        >>> encoder = CNNEncoder(8, channels=16, multipliers=(1, 2), z_channels=16, patch=4)
        >>> encoder.stride
        8
        >>> encoder(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 8, 8, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        z_channels: int = 256,
        quant_kernel: int = 1,
        patch: int = 1,
        image_channels: int = 3,
        attention: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(
            self,
            dim=dim,
            channels=channels,
            blocks=blocks,
            z_channels=z_channels,
            quant_kernel=quant_kernel,
            patch=patch,
            image_channels=image_channels,
        )
        check_odd(self, quant_kernel=quant_kernel)
        self.multipliers = checked_multipliers(self, multipliers)
        self.dim, self.channels, self.blocks, self.z_channels = dim, channels, blocks, z_channels
        self.quant_kernel, self.patch, self.image_channels = quant_kernel, patch, image_channels
        self.attention = attention

        widths = [channels * multiplier for multiplier in self.multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(image_channels * patch**2, channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList(
            Level(before, width, blocks, attention=attention and i == last, downsample=i < last)
            for i, (before, width) in enumerate(zip([channels, *widths], widths, strict=False))
        )
        self.mid = middle(widths[-1], attention=attention)
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(z_channels, dim, quant_kernel, padding=quant_kernel // 2)

    @property
    def stride(self) -> int:
        """Side of the square of pixels that becomes one token."""
        return _stride(self)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: `CNNEncoder(**encoder.config())`."""
        return _config(self)

    def zero_output_(self) -> "CNNEncoder":
        """Makes the output zero, in place, so that in a `Sum` training starts at the other part."""
        _zero_(self.quant_conv)
        return self

    def forward(self, images: Shaped[Tensor, "..."]) -> Float[Tensor, "b h w dim"]:
        """Encodes images `(b, image_channels, H, W)` in [-1, 1]; the stride divides `H` and `W`.

        Raises:
            ValueError: If the images are not channel-first, not floating-point or of another size.
        """
        check_images(self, images, self.image_channels, self.stride)
        x = self.conv_in(F.pixel_unshuffle(images, self.patch))
        for level in self.conv_blocks:
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return self.quant_conv(x).permute(0, 2, 3, 1)


class CNNDecoder(nn.Module):
    """A grid of tokens to images: the mirror of `CNNEncoder`, built from the same arguments.

    Esser et al. 2021, VQGAN; sizes as in LlamaGen (Sun et al. 2024). As there, each level has one
    residual block more than the encoder's, `blocks + 1`. The convolution from the quantizer's
    channels (`post_quant_conv`) is part of the decoder. The output is not clamped.

    Args:
        dim: Channels of a token, those of the quantizer.
        channels: Channels at full resolution.
        multipliers: Channels of each level, as multiples of `channels`, in the encoder's order.
        blocks: Residual blocks of a level of the *encoder*.
        z_channels: Channels after the first convolution, from `dim`.
        quant_kernel: Side of that convolution's kernel, odd: 1, in VAR 3.
        patch: Side of the pixel blocks that are unfolded after the last convolution.
        image_channels: Channels of the images.
        attention: Whether there is any, as in the encoder.

    Raises:
        ValueError: If a size is not a positive integer, `quant_kernel` is even or `multipliers` is
            empty.
    """

    def __init__(
        self,
        dim: int,
        *,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        z_channels: int = 256,
        quant_kernel: int = 1,
        patch: int = 1,
        image_channels: int = 3,
        attention: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(
            self,
            dim=dim,
            channels=channels,
            blocks=blocks,
            z_channels=z_channels,
            quant_kernel=quant_kernel,
            patch=patch,
            image_channels=image_channels,
        )
        check_odd(self, quant_kernel=quant_kernel)
        self.multipliers = checked_multipliers(self, multipliers)
        self.dim, self.channels, self.blocks, self.z_channels = dim, channels, blocks, z_channels
        self.quant_kernel, self.patch, self.image_channels = quant_kernel, patch, image_channels
        self.attention = attention

        widths = [channels * multiplier for multiplier in reversed(self.multipliers)]
        last = len(widths) - 1
        self.post_quant_conv = nn.Conv2d(dim, z_channels, quant_kernel, padding=quant_kernel // 2)
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], attention=attention)
        self.conv_blocks = nn.ModuleList(
            Level(before, width, blocks + 1, attention=attention and i == 0, upsample=i < last)
            for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], image_channels * patch**2, 3, padding=1)

    @property
    def stride(self) -> int:
        """Side of the square of pixels that one token becomes."""
        return _stride(self)

    @property
    def last_layer(self) -> Tensor:
        """The last convolution's weight, where adaptive GAN weights compare gradients."""
        return self.conv_out.weight

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: `CNNDecoder(**decoder.config())`."""
        return _config(self)

    def zero_output_(self) -> "CNNDecoder":
        """Makes the output zero, in place, so that in a `Sum` training starts at the other part."""
        _zero_(self.conv_out)
        return self

    def forward(self, tokens: Shaped[Tensor, "..."]) -> Float[Tensor, "b image_channels H W"]:
        """Decodes tokens `(b, h, w, dim)`, of any grid.

        Raises:
            ValueError: If the tokens are not a channel-last grid of `dim` channels.
        """
        check_tokens(self, tokens, self.dim)
        x = self.mid(self.conv_in(self.post_quant_conv(tokens.permute(0, 3, 1, 2))))
        for level in self.conv_blocks:
            x = level(x)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch)


def _stride(module: CNNEncoder | CNNDecoder) -> int:
    return module.patch * 2 ** (len(module.multipliers) - 1)


def _config(module: CNNEncoder | CNNDecoder) -> dict[str, Any]:
    return {
        "dim": module.dim,
        "channels": module.channels,
        "multipliers": list(module.multipliers),
        "blocks": module.blocks,
        "z_channels": module.z_channels,
        "quant_kernel": module.quant_kernel,
        "patch": module.patch,
        "image_channels": module.image_channels,
        "attention": module.attention,
    }


def _zero_(conv: nn.Conv2d) -> None:
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
