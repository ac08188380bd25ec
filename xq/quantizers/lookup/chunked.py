"""Nearest codes by matrix products over blocks of rows; never holds all n * k scores."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# scores in flight: 4 MiB of float32, which stay in a CPU's cache
_SCORES = 1 << 20


def nearest_chunked(
    x: Float[Tensor, "n dim"], codes: Float[Tensor, "k dim"], metric: str
) -> Int[Tensor, " n"]:
    """Index of the nearest code, the lowest on ties.

    |x - e|^2 = |x|^2 + 2 (|e|^2 / 2 - x.e), of which the bracket alone depends on the code. Far
    from the origin it would lose all digits, so both are taken relative to the codes' mean.
    """
    if metric == "cosine":
        x, codes = F.normalize(x, dim=-1), F.normalize(codes, dim=-1)
    else:
        centre = codes.mean(0)
        x, codes = x - centre, codes - centre
    half_norms = codes.square().sum(-1) / 2
    columns = codes.t()
    rows = max(_SCORES // len(codes), 1)
    out = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for start in range(0, len(x), rows):
        scores = torch.addmm(half_norms, x[start : start + rows], columns, alpha=-1)
        out[start : start + rows] = scores.argmin(-1)
    return out
