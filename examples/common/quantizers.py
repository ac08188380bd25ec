"""The quantizers of the demo, one line each, and how each is trained."""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from xq.models import Tokenizer
from xq.quantizers import (
    BSQ,
    LFQ,
    VQ,
    Codebook,
    EMACodebook,
    ProductQuantizer,
    Pyramid,
    Refine,
    ResidualQuantizer,
    initialize,
)

EMA = partial(EMACodebook, decay=0.97)
SCALES = (1, 1, 2, 3, 3, 4, 5, 6, 7, 8)


def pyramid(dim: int) -> Pyramid:
    """Ten scales for a grid of 8 x 8 tokens, with four convolutions between them."""
    return Pyramid(SCALES, [Refine(dim) for _ in range(4)])


QUANTIZERS = {
    "vq": lambda: VQ(24, 1024, codebook=EMA),
    "rq": lambda: ResidualQuantizer(VQ(24, 1024, codebook=EMA), depth=4),
    "pq": lambda: ProductQuantizer(VQ(6, 1024, codebook=EMA), P=4),
    "lfq": lambda: LFQ(12, bound="tanh"),
    "bsq": lambda: BSQ(12, regularize=False),
    "msvr10p2": lambda: ProductQuantizer(
        ResidualQuantizer(VQ(12, 1024, codebook=EMA), multiscale=pyramid(12)), P=2
    ),
    "msbr10p2": lambda: ProductQuantizer(
        ResidualQuantizer(BSQ(12, regularize=False), multiscale=pyramid(12)), P=2
    ),
}


@torch.no_grad()
def start_codes_(tokenizer: Tokenizer, images: Float[Tensor, "b 3 h w"]) -> None:
    """Sets the codebooks, if there are any, by k-means on what the encoder makes of the images."""
    if any(isinstance(part, Codebook) for part in tokenizer.modules()):
        initialize(tokenizer.quantizer, tokenizer.encoder(images), iterations=5)


@dataclass(frozen=True)
class Recipe:
    """How a tokenizer with one of these quantizers is trained.

    Attributes:
        lr: Highest learning rate.
        whiten: See `start_at_pca_`. Euclidean codes want the distances of pixels; signs want all
            channels alike.
        rotate: See `start_at_pca_`.
        commitment: Weight of that loss.
        regularizer: Weight of the entropy penalty.
    """

    lr: float = 1e-3
    whiten: float = 0.0
    rotate: bool = False
    commitment: float = 0.25
    regularizer: float = 0.0

    @property
    def weights(self) -> dict[str, float]:
        """The arguments of `losses.total`."""
        return {"commitment": self.commitment, "regularizer": self.regularizer}


RECIPES = {
    **dict.fromkeys(QUANTIZERS, Recipe()),
    "lfq": Recipe(lr=2e-3, whiten=0.15, rotate=True, commitment=0.05, regularizer=0.02),
    "bsq": Recipe(lr=2e-3, whiten=0.3, rotate=True),
    "msvr10p2": Recipe(lr=2e-3),
    "msbr10p2": Recipe(lr=2e-3, whiten=1.0),
}
