"""What must hold before a number is given."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Red

# A code this much farther than the nearest is a tie within float32 rounding: relative to the
# squared distance itself, or to the squared norms whose difference it is.
TIE, ROUNDING = 1e-5, 1e-6
_ROWS = 256


class Nearest:
    """The nearest codes of each row, by brute force in float64.

    Args:
        x: `(n, dim)`.
        codes: `(k, dim)`.
        metric: As in `nearest`.
        count: How many codes a row has to name.
    """

    def __init__(self, x: Tensor, codes: Tensor, metric: str = "euclidean", count: int = 1) -> None:
        x, codes = x.detach().double(), codes.detach().double()
        if metric == "cosine":
            x, codes = F.normalize(x, dim=-1), F.normalize(codes, dim=-1)
        self.x, self.codes, self.count = x, codes, count
        self.norms, self.code_norms = x.square().sum(1), codes.square().sum(1)
        blocks = zip(x.split(_ROWS), self.norms.split(_ROWS), strict=True)
        self.best = torch.cat([self._best(rows, norms) for rows, norms in blocks])

    def _best(self, rows: Tensor, norms: Tensor) -> Tensor:
        distances = torch.addmm(norms[:, None] + self.code_norms, rows, self.codes.T, alpha=-2)
        return distances.topk(self.count, largest=False).values

    def hits(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each row names its nearest codes, and how much farther those are that it names.

        Args:
            indices: `(n,)`, or `(n, count)` in any order.
        """
        indices = indices.reshape(len(self.x), self.count).long()
        valid = (indices >= 0) & (indices < len(self.codes))
        found = indices.clamp(0, len(self.codes) - 1)
        chosen = (self.x[:, None] - self.codes[found]).square().sum(-1).sort(1).values
        gap = chosen - self.best
        scale = self.norms[:, None] + self.code_norms[found].amax(1, keepdim=True)
        allowed = torch.maximum(TIE * chosen, ROUNDING * scale)
        twice = found.sort(1).values.diff(dim=1) == 0
        return ((gap <= allowed) & valid).all(1) & ~twice.any(1), gap.amax(1)

    def check(self, name: str, indices: Tensor) -> None:
        """Holds a contender to it.

        Raises:
            Red: If any row names another code, with an example.
        """
        good, gap = self.hits(indices)
        wrong = (~good).nonzero()[:, 0]
        if len(wrong):
            row = int(wrong[0])
            raise Red(
                f"{name} misses the nearest code in {len(wrong)} of {len(good)} rows; row {row} "
                f"names {indices[row].tolist()}, at {gap[row].item():.3g} above the least "
                "squared distance"
            )


def check_close(name: str, what: str, value: Tensor, expected: Tensor, tolerance: float) -> float:
    """How far `value` is from `expected`, relative to its length.

    Raises:
        Red: If that is more than `tolerance`, or not finite.
    """
    off = relative(value, expected)
    if not off <= tolerance:
        raise Red(f"{name}: {what} is off by {off:.3g}, relative; {tolerance:g} is allowed")
    return off


def relative(value: Tensor, expected: Tensor) -> float:
    """The length of the difference over that of `expected`."""
    value, expected = value.detach().double(), expected.detach().double()
    return ((value - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check_finite(name: str, **tensors: Tensor) -> None:
    """Looks at gradients and the like.

    Raises:
        Red: If one is not finite.
    """
    for what, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise Red(f"{name}: {what} is not finite")


def gradient(of: Tensor) -> Tensor:
    """The gradient that has reached a tensor.

    Raises:
        Red: If none has.
    """
    if of.grad is None:
        raise Red(f"no gradient reaches a tensor of shape {tuple(of.shape)}")
    return of.grad
