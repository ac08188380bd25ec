"""The definition of `nearest`, to check every other form against."""

import torch
import torch.nn.functional as F
from jaxtyping import Int, Shaped
from torch import Tensor

from xq.quantizers.lookup.table import Source


def nearest_reference(x: Shaped[Tensor, "n dim"], source: Source, k: int) -> Int[Tensor, "n {k}"]:
    """Indices of the k nearest codes; holds all n * k * dim differences."""
    x, codes = (v.float() if v.dtype.itemsize < 4 else v for v in (x, source.codes))
    if source.metric == "cosine":
        x, codes = F.normalize(x, dim=-1), F.normalize(codes, dim=-1)
    distances = (x[:, None] - codes[None]).square().sum(-1)
    # what is not finite is infinitely far
    return distances.nan_to_num(nan=torch.inf).sort(dim=-1, stable=True).indices[:, :k]
