"""How TiTok's decoder makes pixels of patches: in one step, or through the codes of a VQGAN.

Both work on images in [0, 1], channel-first; what they take is channel-last.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from xq.models.cnn_blocks import Upsample, check_sizes, norm
from xq.models.sizes import Pair
from xq.models.transformer import init_linear_


class MaskGITBlock(nn.Module):
    """Two 3x3 convolutions without bias around a shortcut, each after a normalization and a SiLU.

    Where the number of channels changes, the shortcut is a 1x1 convolution of the block's own
    result, so that its input does not pass around it: so are the weights that TiTok uses.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = in_channels == out_channels
        self.shortcut = None if same else nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(h))


class MaskGITDecoder(nn.Module):
    """Logits over the codes of MaskGIT's VQGAN to images in [0, 1], through the expected code.

    Chang et al. 2022, MaskGIT: VQGAN's decoder without attention. TiTok (Yu et al. 2024, section
    3.3) predicts its codes, and in its second stage trains it on their expectation. The output is
    not clamped.

    Args:
        dim: Channels of a code.
        codebook_size: Number of codes, and of logits.
        channels: Channels at full resolution.
        multipliers: Channels of each level, as multiples of `channels`, from full resolution down;
            the resolution halves from each level to the next.
        blocks: Residual blocks of a level.
        image_channels: Channels of the images.

    Raises:
        ValueError: If a size is not a positive integer or `multipliers` is empty.
    """

    def __init__(
        self,
        dim: int = 256,
        codebook_size: int = 1024,
        *,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        image_channels: int = 3,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "codebook_size": codebook_size, "channels": channels}
        check_sizes(self, **sizes, blocks=blocks, image_channels=image_channels)
        self.multipliers = tuple(multipliers)
        if not self.multipliers:
            raise ValueError(
                "MaskGITDecoder needs `multipliers`, one for each resolution, got none; "
                "the released one has (1, 1, 2, 2, 4)"
            )
        check_sizes(self, **{f"multipliers[{i}]": m for i, m in enumerate(self.multipliers)})
        self.dim, self.codebook_size, self.channels = dim, codebook_size, channels
        self.blocks, self.image_channels = blocks, image_channels

        widths = [channels * multiplier for multiplier in reversed(self.multipliers)]
        last = len(widths) - 1
        # as codes of a VQ start
        self.codes = nn.Parameter(torch.empty(codebook_size, dim))
        nn.init.uniform_(self.codes, -1 / codebook_size, 1 / codebook_size)
        self.conv_in = nn.Conv2d(dim, widths[0], 3, padding=1)
        self.mid = _blocks(widths[0], widths[0], blocks)
        self.levels = nn.ModuleList(
            nn.Sequential(
                _blocks(before, width, blocks), Upsample(width) if i < last else nn.Identity()
            )
            for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], image_channels, 3, padding=1)

    @property
    def stride(self) -> int:
        """Side of the square of pixels that one code becomes."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def last_layer(self) -> Tensor:
        """The last convolution's weight, where adaptive GAN weights compare gradients."""
        return self.conv_out.weight

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, ready for JSON: `MaskGITDecoder(**decoder.config())`."""
        return {
            "dim": self.dim,
            "codebook_size": self.codebook_size,
            "channels": self.channels,
            "multipliers": list(self.multipliers),
            "blocks": self.blocks,
            "image_channels": self.image_channels,
        }

    def forward(
        self, logits: Float[Tensor, "b h w codebook_size"]
    ) -> Float[Tensor, "b image_channels H W"]:
        expected = logits.softmax(-1) @ self.codes
        x = self.mid(self.conv_in(expected.permute(0, 3, 1, 2)))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class CodePixels(nn.Module):
    """Features of patches to pixels through the codes of a VQGAN: two layers with a tanh, then it.

    Args:
        width: Channels of the features.
        vqgan: Makes images of logits.
    """

    def __init__(self, width: int, vqgan: MaskGITDecoder) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 2 * width)
        self.logits = nn.Linear(2 * width, vqgan.codebook_size)
        init_linear_(self)
        self.vqgan = vqgan

    @property
    def last_layer(self) -> Tensor:
        """The VQGAN's last weight."""
        return self.vqgan.last_layer

    def forward(self, x: Float[Tensor, "b h w width"]) -> Float[Tensor, "b c H W"]:
        return self.vqgan(self.logits(self.expand(x).tanh()))


class PatchPixels(nn.Module):
    """Features of patches to pixels: a linear map for each, then a 3x3 convolution over all.

    Args:
        width: Channels of the features.
        patch_size: Height and width of a patch.
        image_channels: Channels of the images.
    """

    def __init__(self, width: int, patch_size: Pair, image_channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patches = nn.Linear(width, patch_size[0] * patch_size[1] * image_channels)
        self.conv_out = nn.Conv2d(image_channels, image_channels, 3, padding=1)
        init_linear_(self)

    @property
    def last_layer(self) -> Tensor:
        """The convolution's weight."""
        return self.conv_out.weight

    def forward(self, x: Float[Tensor, "b h w width"]) -> Float[Tensor, "b c H W"]:
        p, q = self.patch_size
        return self.conv_out(
            rearrange(self.patches(x), "b h w (p q c) -> b c (h p) (w q)", p=p, q=q)
        )


def _blocks(in_channels: int, out_channels: int, count: int) -> nn.Sequential:
    inputs = [in_channels] + [out_channels] * (count - 1)
    return nn.Sequential(*(MaskGITBlock(channels, out_channels) for channels in inputs))
