"""k-means: where codebooks start."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from xq.quantizers.lookup import nearest

# of the centres drawn together, one for so many that are there already
_TOGETHER = 8


def plus_plus(
    x: Float[Tensor, "n dim"],
    codebook_size: int,
    generator: torch.Generator,
    start: Float[Tensor, "k dim"] | None = None,
) -> Float[Tensor, "codebook_size dim"]:
    """Centres drawn far from one another (k-means++, Arthur and Vassilvitskii 2007).

    Each is a vector of `x`, with a probability proportional to its squared distance from those
    already drawn. Once there are some, several are drawn at a time, an eighth of them: 4096 centres
    take some 60 passes over the data and not 4096 (as in k-means||, Bahmani et al. 2012).

    Args:
        x: Vectors. Where there are fewer different ones than centres, some are drawn twice.
        codebook_size: How many centres.
        generator: For the draws, on the CPU.
        start: Centres that are there from the start, which come first; none by default.
    """
    found = x[:0] if start is None else start
    distance = torch.ones_like(x[:, 0]) if not len(found) else _distances(x, found)
    while len(found) < codebook_size:
        many = min(max(len(found) // _TOGETHER, 1), codebook_size - len(found))
        new = x[_drawn(distance, many, generator)]
        near = _distances(x, new)
        distance = near if not len(found) else torch.minimum(distance, near)
        found = torch.cat([found, new])
    return found


def lloyd(
    x: Float[Tensor, "n dim"],
    centres: Float[Tensor, "k dim"],
    iterations: int,
    generator: torch.Generator,
    metric: str = "euclidean",
) -> tuple[Float[Tensor, "k dim"], Float[Tensor, " k"]]:
    """Moves centres to the means of the vectors nearest to them; with how many each has in the end.

    A centre that has none goes where vectors are far from theirs, and takes part from then on.
    """
    unit = F.normalize(x, dim=-1) if metric == "cosine" else x
    for left in range(iterations, 0, -1):
        chosen, count = _clusters(x, centres, metric)
        total = torch.zeros_like(centres).index_add_(0, chosen, x)
        means = total / count.clamp(min=1)[:, None]
        centres = torch.where(count[:, None] > 0, means, centres)
        empty = (count == 0).nonzero()[:, 0]
        # not in the last round, which would leave it without its mean
        if len(empty) and left > 1:
            codes = F.normalize(centres, dim=-1) if metric == "cosine" else centres
            distance = (unit - codes[chosen]).square().sum(-1)
            centres[empty] = x[_drawn(distance, len(empty), generator)]
    return centres, _clusters(x, centres, metric)[1]


def _clusters(x: Tensor, centres: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The centre that each vector chooses, and how many choose each."""
    chosen = nearest(x, centres, metric)
    return chosen, torch.bincount(chosen, minlength=len(centres)).to(x.dtype)


def _distances(x: Tensor, centres: Tensor) -> Float[Tensor, " n"]:
    """Squared distance of each vector to the nearest centre."""
    return (x - centres[nearest(x, centres)]).square().sum(-1)


def _drawn(weight: Float[Tensor, " n"], many: int, generator: torch.Generator) -> Int[Tensor, " m"]:
    """Rows with a probability proportional to their weight; no row twice while others weigh."""
    # on the CPU, so that one seed draws the same rows everywhere
    weight = weight.double().cpu()
    # exponential keys: the smallest of -log(u) / w are a draw without replacement
    keys = torch.empty_like(weight).exponential_(generator=generator) / weight
    best = keys.topk(min(many, len(keys)), largest=False).indices
    if len(best) < many:
        best = best.repeat(-(-many // len(best)))[:many]
    return best.to(weight.device)
