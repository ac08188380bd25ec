"""The demo's encoder and decoder: a linear path, and a small convolutional network beside it."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xq.models import LinearDecoder, LinearEncoder, Sum, fit_pca_

STRIDE = 8
# pixels that are folded into channels before the first convolution
_FOLD = 4


class SmallEncoder(nn.Module):
    """Images to tokens of 8 x 8 pixels, each aware of its neighbours.

    Args:
        dim: Channels of a token.
        channels: Of the first convolution; twice as many at the resolution of the tokens.
    """

    def __init__(self, dim: int, channels: int = 64) -> None:
        super().__init__()
        self.dim, self.channels = dim, channels
        self.layers = nn.Sequential(
            nn.PixelUnshuffle(_FOLD),
            _conv(3 * _FOLD**2, channels),
            Block(channels),
            nn.Conv2d(channels, 2 * channels, 2, stride=2),
            Block(2 * channels),
            Block(2 * channels),
            nn.SiLU(),
        )
        self.last = _zero(nn.Conv2d(2 * channels, dim, 1))

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b h w dim"]:
        return self.last(self.layers(images)).permute(0, 2, 3, 1)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, which let a `Tokenizer` save this module."""
        return {"dim": self.dim, "channels": self.channels}


class SmallDecoder(nn.Module):
    """Tokens to images: the mirror of `SmallEncoder`.

    Args:
        dim: Channels of a token.
        channels: As the encoder's.
    """

    def __init__(self, dim: int, channels: int = 64) -> None:
        super().__init__()
        self.dim, self.channels = dim, channels
        self.layers = nn.Sequential(
            _conv(dim, 2 * channels),
            Block(2 * channels),
            Block(2 * channels),
            nn.Conv2d(2 * channels, 4 * channels, 1),
            nn.PixelShuffle(2),
            Block(channels),
            Block(channels),
            nn.SiLU(),
        )
        self.last = _zero(_conv(channels, 3 * _FOLD**2))

    def forward(self, tokens: Float[Tensor, "b h w dim"]) -> Float[Tensor, "b 3 H W"]:
        return F.pixel_shuffle(self.last(self.layers(tokens.permute(0, 3, 1, 2))), _FOLD)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, which let a `Tokenizer` save this module."""
        return {"dim": self.dim, "channels": self.channels}


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut; the identity at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(8, channels) for _ in range(2))
        self.conv1, self.conv2 = _conv(channels, channels), _zero(_conv(channels, channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


def make_network(dim: int, channels: int = 64) -> tuple[Sum, Sum]:
    """An encoder to vectors of `dim` channels, and a decoder back."""
    encoder = Sum(linear=LinearEncoder(dim, STRIDE), cnn=SmallEncoder(dim, channels))
    decoder = Sum(linear=LinearDecoder(dim, STRIDE), cnn=SmallDecoder(dim, channels))
    return encoder, decoder


def start_at_pca_(
    encoder: Sum,
    decoder: Sum,
    images: Float[Tensor, "b 3 h w"],
    *,
    branches: int = 1,
    whiten: float = 0.0,
    rotate: bool = False,
) -> None:
    """Lets the linear path carry the principal components of the images: the rest starts at zero.

    Args:
        encoder: Of `make_network`.
        decoder: Likewise.
        images: Whose components they are.
        branches: Of a product quantizer; components are dealt out so that all get their share.
        whiten: Divides each component by this power of its standard deviation: 0 keeps distances
            those of pixels, 1 gives all channels the same variance.
        rotate: Whether to mix the channels by a random rotation, and give them variance 1 on
            average: a sign of each then tells a little of every component, most of the largest.
    """
    forth, back = encoder.parts["linear"], decoder.parts["linear"]
    fit_pca_(forth, back, images)
    order = _deal(forth.dim, branches)
    scale = forth(images).flatten(0, 2).std(0).detach()
    spread = scale ** (1 - whiten)
    scale = scale**whiten
    mix = torch.eye(forth.dim)[order]
    if rotate:
        mix = nn.init.orthogonal_(torch.empty(forth.dim, forth.dim))
        scale = scale * spread.square().mean().sqrt()
    forth.linear.weight.data = mix @ (forth.linear.weight.data / scale[:, None])
    forth.linear.bias.data = mix @ (forth.linear.bias.data / scale)
    back.linear.weight.data = (back.linear.weight.data * scale) @ mix.T


def _deal(count: int, hands: int) -> list[int]:
    """0 .. count - 1, dealt to and fro; the items of each hand side by side."""
    rounds = [list(range(start, start + hands)) for start in range(0, count, hands)]
    dealt = [cards[::-1] if i % 2 else cards for i, cards in enumerate(rounds)]
    return [cards[hand] for hand in range(hands) for cards in dealt]


def _conv(before: int, after: int) -> nn.Conv2d:
    # repeated edges: a border of zeros shows as seams between crops
    return nn.Conv2d(before, after, 3, padding=1, padding_mode="replicate")


def _zero(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
