"""What every search needs of a codebook, computed once however many vectors look it up."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

METRICS = ("euclidean", "cosine")
# codes of which a search keeps the smallest score, to look into the best such group once more
GROUP = 16
# codes of which the middle is taken
SAMPLE = 64
# searches number codes in 32 bits
_MOST_CODES = 2**31 - 2**10


class Table(NamedTuple):
    """A codebook made ready for `nearest`; `prepare` makes it.

    |x - e|^2 = |x|^2 + 2 (|e|^2 / 2 - x.e), of which the bracket alone depends on the code: one
    product of (e, |e|^2 / 2) and (-x, 1). Far from the origin it would lose all digits, so vectors
    and codes are taken relative to the middle of the codes.

    Attributes:
        codes: The codes as given.
        metric: See `nearest`.
        rows: `(k, dim + 1)` and padding on both axes, in float32 or wider: points (with "cosine"
            normalized) relative to `centre`, then half their squared length. That is infinite for
            padding and for codes that are not finite, so none is nearest.
        centre: See `middle`.
    """

    codes: Shaped[Tensor, "k dim"]
    metric: str
    rows: Float[Tensor, "_ _"]
    centre: Float[Tensor, " dim"]


@torch.no_grad()
def prepare(codes: Shaped[Tensor, "..."], metric: str = "euclidean") -> Table:
    """What `nearest` takes instead of `codes`, for codes that are looked up repeatedly.

    Saves a few passes over the codes at each lookup. It does not follow later changes of `codes`.

    Raises:
        ValueError: If `metric` is unknown, or `codes` are no codes.
    """
    check_metric(metric)
    check_codes(codes)
    codes = codes.detach()
    wide = codes.float() if codes.dtype.itemsize < 4 else codes
    size, dim = codes.shape
    rows = _zeros(wide)
    points, half_norms = rows[:size, :dim], rows[:, dim]
    lengths = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    broken = ~(lengths < torch.inf)
    scale = lengths.clamp(min=1e-12) if metric == "cosine" else torch.ones_like(lengths)
    # makes zeros of codes that are not finite; to fill their rows would take five times as long
    points.copy_(wide).div_(scale.masked_fill_(broken, torch.inf)).nan_to_num_(0, 0, 0)
    centre = middle(points)
    points.sub_(centre)
    half_norms.fill_(torch.inf)
    squares = torch.linalg.vector_norm(points, dim=-1).square_().div_(2)
    half_norms[:size] = squares.masked_fill_(broken[:, 0], torch.inf)
    return Table(codes, metric, rows, centre)


def _zeros(codes: Float[Tensor, "k dim"]) -> Float[Tensor, "_ _"]:
    size, width = len(codes), codes.shape[1] + 1
    if codes.device.type == "cpu":
        return codes.new_zeros(round_up(size, GROUP), width)
    # a GPU's threads, each with a code of its own, read one channel of adjacent codes at a time
    return codes.new_zeros(round_up(width, 16), round_up(size, 64)).t()


class Source:
    """Codes for a search, made ready where one asks for it."""

    def __init__(
        self, codes: Tensor, metric: str, rows: Tensor | None = None, centre: Tensor | None = None
    ) -> None:
        self.codes, self.metric = codes, metric
        self._table = None
        if rows is not None and centre is not None:
            self._table = Table(codes, metric, rows, centre)

    @property
    def is_ready(self) -> bool:
        """Whether `table` costs nothing."""
        return self._table is not None

    @property
    def table(self) -> Table:
        if self._table is None:
            self._table = prepare(self.codes, self.metric)
        return self._table


def middle(codes: Float[Tensor, "k dim"]) -> Float[Tensor, " dim"]:
    """The median, channel by channel, of some codes: near most of them, whatever a few may be.

    A single code that has diverged would carry a mean away.
    """
    return codes[:: max(len(codes) // SAMPLE, 1)].median(0).values


def check_codes(codes: Tensor) -> None:
    """Raises a `ValueError` for what is no table of codes."""
    if codes.ndim != 2 or codes.shape[0] == 0 or codes.shape[1] == 0:
        raise ValueError(
            f"nearest expects codes (k, dim), one or more, not empty, got {tuple(codes.shape)}"
        )
    if len(codes) > _MOST_CODES:
        raise ValueError(
            f"nearest numbers codes in 32 bits and takes up to {_MOST_CODES}, got {len(codes)}; "
            "a ProductQuantizer or ResidualQuantizer makes more of fewer"
        )
    if not codes.is_floating_point():
        raise ValueError(f"nearest expects floating-point codes, got {codes.dtype}")


def check_metric(metric: str) -> None:
    """Raises a `ValueError` for an unknown metric."""
    if metric not in METRICS:
        raise ValueError(f"nearest knows the metrics {METRICS}, got {metric!r}")


def relative(
    x: Shaped[Tensor, "*batch dim"], metric: str, centre: Float[Tensor, " dim"]
) -> Float[Tensor, "*batch dim"]:
    """Vectors in the terms of a table's points."""
    x = x.to(centre.dtype)
    return (F.normalize(x, dim=-1) if metric == "cosine" else x) - centre


def round_up(n: int, step: int) -> int:
    """The smallest multiple of `step` that is no less than `n`."""
    return -(-n // step) * step
