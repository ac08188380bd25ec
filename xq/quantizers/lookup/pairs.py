"""The best pairs of one of several vectors and a code: what a beam search asks of a codebook."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xq.quantizers.lookup.table import Table

# so few scores are compared as they are, and so many groups are made of more
_FEW = 64


class PairSearch:
    """Finds the best of all pairs by distance, for one table.

    Args:
        table: Of codes whose distance counts, so one of normalized codes or for "euclidean".
    """

    def __init__(self, table: Table) -> None:
        self.dim, self.centre = table.codes.shape[1], table.centre
        rows = table.rows[:, : self.dim + 1]
        # the last column takes up half the squared length of each vector
        self.columns = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1).t()
        self.codes = len(rows)

    def __call__(
        self, u: Float[Tensor, "n vectors dim"], k: int
    ) -> tuple[Int[Tensor, "n found"], Int[Tensor, "n found"]]:
        """Places of the vectors and of the codes in up to `k` pairs, the nearest first.

        Holds a score for each vector and code. A code that is not finite is found last.
        """
        n, vectors, dim = u.shape
        relative = self.centre - u.reshape(-1, dim)
        half = relative.square().sum(-1, keepdim=True) / 2
        rows = torch.cat([relative, torch.ones_like(half), half], dim=1)
        scores = (rows @ self.columns).view(n, vectors * self.codes)
        places = smallest(scores, min(k, vectors * self.codes))
        return places // self.codes, places % self.codes


def smallest(scores: Float[Tensor, "n m"], k: int) -> Int[Tensor, "n {k}"]:
    """Places of the k smallest numbers in each row, the smallest first, equal ones in any order.

    They lie in the k groups with the smallest minima. Minima of what lies apart in memory are
    vectorised, so this takes a fraction of the time of `topk` over all.
    """
    n, m = scores.shape
    groups = max(8 * k, _FEW)
    if m < 2 * groups:
        return scores.topk(k, largest=False).indices
    if m % groups:
        padding = scores.new_full((n, groups - m % groups), torch.inf)
        scores = torch.cat([scores, padding], dim=1)
    grouped = scores.view(n, -1, groups)
    best = grouped.amin(1).topk(k, largest=False, sorted=False).indices
    near = grouped.gather(2, best[:, None].expand(-1, grouped.shape[1], -1))
    found = smallest(near.flatten(1), k)
    return found // k * groups + best.gather(1, found % k)
