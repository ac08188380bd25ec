"""FSQ: each channel is rounded to one of a few levels."""

import math
import operator
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xq.quantizers.base import Depth, Losses, Quantized, Quantizer
from xq.quantizers.constants import constant

# float32 tells these levels of a channel safely apart
_MOST_LEVELS = 2**20
# by this share the paper's tanh stays short of the outermost level, and vqp's goes beyond it
_MARGIN = 1e-3


class _Curve(NamedTuple):
    """The bound of a channel in units of `z`: `reach * squashed(slope * x + shift) + offset`."""

    reach: float = 1.0
    slope: float = 1.0
    shift: float = 0.0
    offset: float = 0.0


def _around_zero(levels: int, margin: float, unshift: Callable[[float], float]) -> _Curve:
    """Zero is a level: an even number of them lies half a level lower, and `shift` undoes that."""
    reach, lower = (levels - 1) * (1 + margin) / 2, 0.0 if levels % 2 else 0.5
    unit = levels // 2
    return _Curve(reach / unit, shift=unshift(lower / reach), offset=-lower / unit)


def _even(levels: int) -> _Curve:
    reach = levels / (levels - 1)
    return _Curve(reach, slope=1 / reach)


# encoders were trained with these numbers: a name keeps its own, other numbers get another name
_CURVES: dict[str, Callable[[int], _Curve]] = {
    "even": _even,
    "symmetric": lambda levels: _Curve(),
    "ifsq": lambda levels: _Curve(slope=0.8),
    "clamp": lambda levels: _Curve(),
    "paper": lambda levels: _around_zero(levels, -_MARGIN, math.tan),
    "vqp": lambda levels: _around_zero(levels, _MARGIN, math.atanh),
}
_AROUND_ZERO = ("paper", "vqp")


class FSQ(Quantizer):
    """Finite scalar quantization: each channel to a level (Mentzer et al. 2023, section 3.1).

    The codes are all combinations of levels, so there is no codebook. The level of channel 0 is the
    least significant digit of an index, as in the paper. Nothing pulls vectors to their codes, as
    in the paper: all losses are zero, also in a residual, since a commitment would gather them at
    the middle levels.

    `bound` says how `x` comes into the range of the codes. Its names fix the numbers for ever:

    | name | `bound(x)` for n levels | code k of 0..n-1 | from |
    |---|---|---|---|
    | "even" | `c tanh(x / c)`, `c = n / (n - 1)` | `(2 k - n + 1) / (n - 1)` | ResidualFSQ of vqp |
    | "symmetric" | `tanh(x)` | the same | vqp's `preserve_symmetry` |
    | "ifsq" | `tanh(0.8 x)` | the same | Lin et al. 2026 |
    | "clamp" | `x` cut off at -1 and 1 | the same | vqp's `bound_hard_clamp`, with symmetry |
    | "paper" | `(h tanh(x + tan(o / h)) - o) / (n // 2)` | `(k - n // 2) / (n // 2)` | appendix |
    | "vqp" | the same with `atanh` for `tan` | the same | vqp's FSQ |

    Here `o` is 1/2 for even n and 0 for odd, `h` is `(n - 1) / 2` times 0.999 ("paper") or 1.001
    ("vqp", which is vector-quantize-pytorch 1.31 and 1.32). By default levels are equally wide and
    codes lie around zero, so that `depth` steps of a residual of n levels are one quantizer of
    `n**depth` levels.

    Args:
        levels: How many levels each channel has; their number is `dim`, their product, below
            2**63, `codebook_size`.
        bound: A name above.

    Raises:
        ValueError: If a number of levels does not fit, or the bound is unknown.

    Examples:
        >>> fsq = FSQ([8, 5, 5, 5])
        >>> fsq.dim, fsq.codebook_size
        (4, 1000)
        >>> z, indices, _ = fsq(torch.randn(2, 256, 4))
        >>> torch.equal(fsq.decode(indices), z)
        True
    """

    def __init__(self, levels: Iterable[Any], *, bound: str = "even") -> None:
        super().__init__()
        if bound not in _CURVES:
            raise ValueError(f"FSQ knows the bounds {tuple(_CURVES)}, got bound={bound!r}")
        if not isinstance(levels, Iterable):
            raise ValueError(f"FSQ needs the levels of each channel, [8, 5, 5] say, got {levels!r}")
        self.levels = _checked(tuple(levels))
        if bound in _AROUND_ZERO and 2 in self.levels:
            raise ValueError(
                f"FSQ with bound={bound!r} needs 3 levels or more, got levels={self.levels}: zero "
                'is among them, and the other would be -1; bound="even" makes it -1 and 1'
            )
        self.dim, self.codebook_size = len(self.levels), math.prod(self.levels)
        self.bound_name = bound
        self._curves = tuple(zip(*map(_CURVES[bound], self.levels), strict=True))
        # code k is (2 k - span) / span
        around_zero = bound in _AROUND_ZERO
        spans = tuple(n - (n % 2 if around_zero else 1) for n in self.levels)
        # the level of `u` is that of `scale * u + middle`, rounded down
        scale, middle = tuple(s / 2 for s in spans), tuple((s + 1) / 2 for s in spans)
        self._spans, self._rounding = spans, (scale, middle, tuple(n - 1 for n in self.levels))
        self._places = tuple(accumulate(self.levels[:-1], operator.mul, initial=1))
        # what a step leaves then fills the levels of the next, but for the lowest where they lie
        # lower; with 1 / (n - 1) throughout, two levels would not refine
        pairs = zip(self.levels, spans, strict=True)
        self.shrink = tuple(1 / (n - 1 if span == n else n) for n, span in pairs)

    def bound(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        reach, slope, shift, offset = constant(torch.tensor, self._curves, like=x)
        x = torch.addcmul(shift, slope, x)
        x = x.clamp(-1, 1) if self.bound_name == "clamp" else x.tanh()
        return torch.addcmul(offset, reach, x)

    def quantize(self, u: Float[Tensor, "*batch dim"], depth: Depth = None) -> Quantized:
        scale, middle, tops = constant(torch.tensor, self._rounding, like=u)
        level = torch.addcmul(middle, scale, u.detach()).floor_()
        # inside a residual `u` may leave the domain, and NaN is no level
        level = level.nan_to_num_(0.0).clamp_(min=0).minimum(tops)
        zero = u.new_zeros(())
        return Quantized(self._codes(level), self._joined(level.long()), Losses(zero, zero, zero))

    def dequantize(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        places, sizes = constant(torch.tensor, (self._places, self.levels), like=indices)
        return self._codes((indices[..., None] // places % sizes).float())

    def _codes(self, level: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        spans = constant(torch.tensor, self._spans, like=level)
        return level.mul(2).sub_(spans).div_(spans)

    def _joined(self, level: Int[Tensor, "*batch dim"]) -> Int[Tensor, "*batch"]:
        return (level * constant(torch.tensor, self._places, like=level)).sum(-1)

    @property
    def domain(self) -> str:
        if self.bound_name == "symmetric":
            # which LFQ has too
            return "cube"
        alike = self.bound_name in ("ifsq", "clamp")
        return self.bound_name if alike else f"{self.bound_name} {self.levels}"

    @property
    def regularizes(self) -> bool:
        return False

    @property
    def commits(self) -> bool:
        return False

    def config(self) -> dict[str, Any]:
        return {"levels": list(self.levels), "bound": self.bound_name}

    def extra_repr(self) -> str:
        return f"{list(self.levels)}, bound={self.bound_name!r}"


def _checked(levels: tuple[Any, ...]) -> tuple[int, ...]:
    """`levels` as integers; raises a `ValueError` unless an int64 can count their combinations."""
    if not levels:
        raise ValueError("FSQ needs the number of levels of each channel, got none")
    for n in levels:
        is_integer = hasattr(n, "__index__") and not isinstance(n, bool)
        if not is_integer or not 2 <= operator.index(n) <= _MOST_LEVELS:
            raise ValueError(
                f"FSQ needs from 2 to {_MOST_LEVELS} levels in each channel, got {n!r} in "
                f"levels={levels}"
            )
    levels = tuple(map(operator.index, levels))
    if math.prod(levels) >= 2**63:
        raise ValueError(
            f"FSQ needs fewer than 2**63 codes, which an int64 can count, got {math.prod(levels)} "
            f"of levels={levels}; ProductQuantizer splits the channels over several indices"
        )
    return levels
