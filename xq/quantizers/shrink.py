"""How a flat residual scales its steps.

Codes of fixed size do not refine: sums of +-1 lie on a lattice of pitch 2 however many there are.
So step k quantizes `rest / shrink**k` and multiplies its code back (as vector-quantize-pytorch's
ResidualLFQ and ResidualFSQ do).
"""

import torch
from torch import Tensor

from xq.quantizers.constants import constant

Shrink = float | tuple[float, ...]


def power(shrink: Shrink, k: int) -> Shrink:
    """`shrink**k`, channel by channel."""
    return tuple(s**k for s in shrink) if isinstance(shrink, tuple) else shrink**k


def as_factor(scale: Shrink, like: Tensor) -> float | Tensor:
    """A scale in a form that multiplies `like`."""
    return constant(torch.tensor, scale, like=like) if isinstance(scale, tuple) else scale


def divided(x: Tensor, scale: Shrink) -> Tensor:
    """`x / scale`; `x` itself where that changes nothing, as in every pyramid."""
    return x if scale == 1 else x / as_factor(scale, x)


def multiplied(z: Tensor, scale: Shrink) -> Tensor:
    """`z * scale`, likewise."""
    return z if scale == 1 else z * as_factor(scale, z)


def joined(shrinks: list[Shrink], dims: list[int]) -> Shrink:
    """The scale of channels side by side: one number where all agree."""
    flat = [
        s
        for shrink, dim in zip(shrinks, dims, strict=True)
        for s in (shrink if isinstance(shrink, tuple) else (shrink,) * dim)
    ]
    return flat[0] if len(set(flat)) == 1 else tuple(flat)
