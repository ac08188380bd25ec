"""Nearest codes by matrix products over blocks that stay in a cache; on any device.

On a CPU `argmax` over a block of scores takes longer than their computation, since torch does not
vectorise it. What it does vectorise is `max_pool2d` of an image whose channels lie side by side,
and this tells where each maximum is. So vectors are taken for channels and codes for pixels.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from xq.quantizers.lookup.table import GROUP, Table, relative

# scores in flight: 2 MiB of float32 stay in the caches of two cores; a GPU has more to fill
_SCORES, _SCORES_GPU = 1 << 19, 1 << 21
# vectors searched together, the more the fewer codes there are
_FEWEST, _MOST = 256, 2048
# codes in one pool; each has a thread to itself
_POOL = 64
# fewer vectors than these leave lanes of a pool empty
_LANES = 16
# of several codes: vectors searched together, and numbers in flight, 4 MiB of float32
_FEWEST_SEVERAL, _MOST_SEVERAL, _KEPT = 256, 1024, 1 << 20
# codes, for each that is wanted, of which all scores are compared: groups would save nothing
_WHOLE = 512


def nearest_chunked(x: Shaped[Tensor, "n dim"], table: Table, k: int = 1) -> Int[Tensor, "n {k}"]:
    """Indices of the k nearest codes, nearest first; of one the lower of two that tie.

    Takes under 32 MiB beyond the table and the result.
    """
    out = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    if len(x) == 0:
        return out
    search = _Nearest(table, len(x)) if k == 1 else _Several(table, len(x), k)
    for part, found in zip(x.split(search.block), out.split(search.block), strict=True):
        found.copy_(search(part))
    return out


class _Search:
    """Searches blocks of vectors one after the other, in the same memory.

    The score of a code is x.e - |e|^2 / 2: the larger, the nearer.

    Attributes:
        block: The most vectors in a block.
    """

    def __init__(self, table: Table, block: int) -> None:
        self.table, self.block = table, block
        self.rows = table.rows[:, : len(table.centre) + 1]
        scores = _scores_for(self.rows)
        self.codes = min(max(scores // block // GROUP, 1) * GROUP, len(self.rows))
        self.points = self.rows.new_full((block, self.rows.shape[1]), -1.0)
        self.scores = self.rows.new_empty(self.codes * block)

    def _placed(self, x: Shaped[Tensor, "n dim"]) -> Float[Tensor, "n width"]:
        """The vectors as factors of scores."""
        points = self.points[: len(x)]
        points[:, :-1] = relative(x, self.table.metric, self.table.centre)
        return points

    def _scored(self, points: Float[Tensor, "n width"]) -> Iterator[Float[Tensor, "codes n"]]:
        """The scores of some codes after the other, each gone with the next."""
        for rows in self.rows.split(self.codes):
            scores = self.scores[: len(rows) * len(points)]
            if len(points) < _LANES:
                yield torch.mm(points, rows.t(), out=scores.view(len(points), -1)).t()
            else:
                yield torch.mm(rows, points.t(), out=scores.view(len(rows), -1))


def _scores_for(rows: Tensor) -> int:
    return _SCORES if rows.device.type == "cpu" else _SCORES_GPU


class _Nearest(_Search):
    def __init__(self, table: Table, length: int) -> None:
        block = min(max(_scores_for(table.rows) // len(table.rows), _FEWEST), _MOST)
        super().__init__(table, min(block, length))

    def __call__(self, x: Shaped[Tensor, "n dim"]) -> Int[Tensor, "n 1"]:
        parts = [_maxima(scores, _POOL) for scores in self._scored(self._placed(x))]
        values = torch.cat([value for value, _ in parts])
        places = torch.cat([place.add_(i * self.codes) for i, (_, place) in enumerate(parts)])
        value, best = _maxima(values, len(values))
        # a vector with NaN has no other score
        return places.gather(0, best).masked_fill_(value.isnan(), 0).t()


def _maxima(scores: Float[Tensor, "m n"], size: int) -> tuple[Tensor, Tensor]:
    """The maxima of each `size` rows (or more of them), and the first row that has it."""
    if scores.device.type != "cpu" or scores.shape[1] < _LANES:
        return scores.max(0, keepdim=True)
    image = scores[None, None].permute(0, 3, 1, 2)
    pooled, rows = F.max_pool2d(image, (1, size), return_indices=True, ceil_mode=True)
    return pooled[0, :, 0].t(), rows[0, :, 0].t()


class _Several(_Search):
    """Keeps the maximum of each group of codes; the k nearest codes lie in the k best groups."""

    def __init__(self, table: Table, length: int, k: int) -> None:
        padded, width = table.rows.shape
        self.k, self.whole = k, padded <= k * _WHOLE
        if self.whole:
            block = _KEPT // padded
        else:
            block = min(max(_scores_for(table.rows) // padded, _FEWEST_SEVERAL), _MOST_SEVERAL)
            block = min(block, _KEPT * GROUP // padded, _KEPT // (k * GROUP * width))
        super().__init__(table, max(min(block, length), 1))

    def __call__(self, x: Shaped[Tensor, "n dim"]) -> Int[Tensor, "n {self.k}"]:
        points = self._placed(x)
        if self.whole:
            # padding could be named where codes that are not finite are as far
            rows = self.rows[: len(self.table.codes)]
            return torch.mm(points, rows.t()).topk(self.k).indices
        maxima = [s.unflatten(0, (-1, GROUP)).amax(1) for s in self._scored(points)]
        groups = torch.cat(maxima).t().topk(self.k, sorted=False).indices
        near = self.rows.unflatten(0, (-1, GROUP)).index_select(0, groups.flatten())
        near = near.reshape(len(groups), self.k * GROUP, -1)
        within = torch.bmm(near, points[..., None])[..., 0].topk(self.k).indices
        found = groups.gather(1, within // GROUP) * GROUP + within % GROUP
        # only a vector that is not finite can have met the padding
        return found.clamp_(max=len(self.table.codes) - 1)
