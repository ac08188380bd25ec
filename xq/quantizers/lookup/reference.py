"""The definition of `nearest`, to check every other form against."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def nearest_reference(
    x: Float[Tensor, "n dim"], codes: Float[Tensor, "k dim"], metric: str
) -> Int[Tensor, " n"]:
    """Index of the nearest code, the lowest on ties; holds all n * k * dim differences."""
    if metric == "cosine":
        x, codes = F.normalize(x, dim=-1), F.normalize(codes, dim=-1)
    return (x[:, None] - codes[None]).square().sum(-1).argmin(-1)
