"""The nearest code in a few operators of torch, for programs that know no others."""

from jaxtyping import Int, Shaped
from torch import Tensor

from xq.quantizers.lookup.table import Source, relative


def nearest_plain(
    x: Shaped[Tensor, "*batch dim"],
    codes: Shaped[Tensor, "size dim"],
    metric: str,
    rows: Tensor | None,
    centre: Tensor | None,
    k: int,
    backend: str,
) -> Int[Tensor, "*batch {k}"]:
    """What the operator `xq::nearest` returns, on any backend; holds a score for each code."""
    table = Source(codes, metric, rows, centre).table
    size, dim = codes.shape
    points, half_norms = table.rows[:size, :dim], table.rows[:size, dim]
    scores = relative(x, table.metric, table.centre) @ points.T - half_norms
    return scores.argmax(-1, keepdim=True) if k == 1 else scores.topk(k).indices
