"""Nearest codes by matrix products over blocks that stay in a cache; on any device.

On a CPU `argmin` over the scores of a block takes longer than their computation, since torch does
not vectorise it, as it does `amin`. So only the smallest score of each group of codes is kept, the
best group found among these, and looked into once more: the same index, several times sooner.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from xq.quantizers.lookup.table import GROUP, Table, relative

# scores in flight: 2 MiB of float32 stay in the caches of two cores; a GPU has more to fill
_SCORES, _SCORES_GPU = 1 << 19, 1 << 21
# vectors searched together, where the codes leave room for them
_FEWEST, _MOST = 256, 1024
# numbers in flight that are kept of each group, or copied to look into groups: 4 MiB of float32
_KEPT = 1 << 20
# codes, for each that is wanted, of which all scores are compared: groups would save nothing
_WHOLE = 512
# so few scores are not worth a second look
_LITTLE = 1 << 16
# rows among which the smallest is found in one go
_LEVEL = 32


def nearest_chunked(x: Shaped[Tensor, "n dim"], table: Table, k: int = 1) -> Int[Tensor, "n {k}"]:
    """Indices of the k nearest codes, nearest first; of one the lower of two that tie.

    Takes under 32 MiB beyond the table and the result.
    """
    out = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    if len(x) == 0:
        return out
    rows = table.rows[:, : x.shape[1] + 1]
    if _compares_all(rows, k):
        rows = rows[: len(table.codes)]
    search = _Search(rows, k, len(x))
    for part, found in zip(x.split(search.block), out.split(search.block), strict=True):
        search(relative(part, table.metric, table.centre), found)
    # only a vector that is not finite can have met the padding
    return out.clamp_(max=len(table.codes) - 1)


def _compares_all(rows: Tensor, k: int) -> bool:
    return k > 1 and len(rows) <= k * _WHOLE


class _Search:
    """Searches blocks of vectors one after the other, in the same memory."""

    def __init__(self, rows: Float[Tensor, "padded width"], k: int, length: int) -> None:
        self.rows, self.k = rows, k
        padded, width = rows.shape
        scores = _SCORES if rows.device.type == "cpu" else _SCORES_GPU
        self.whole = _compares_all(rows, k)
        if self.whole:
            block = _KEPT // padded
        else:
            block = min(max(scores // padded, _FEWEST), _MOST)
            block = min(block, _KEPT * GROUP // padded, _KEPT // (k * GROUP * width))
        self.block = max(min(block, length), 1)
        self.codes = min(max(scores // self.block // GROUP, 1) * GROUP, padded)
        self.columns = rows.new_empty(width * self.block)
        self.scores = rows.new_empty(self.codes * self.block)
        self.minima = rows.new_empty(padded // GROUP * self.block)

    def __call__(self, x: Float[Tensor, "n dim"], out: Int[Tensor, "n {self.k}"]) -> None:
        columns = _view(self.columns, self.rows.shape[1], len(x))
        torch.neg(x.t(), out=columns[:-1])
        columns[-1] = 1
        if self.whole or len(x) * len(self.rows) <= _LITTLE:
            out.copy_(_smallest(torch.mm(columns.t(), self.rows.t()), self.k))
        elif self.k == 1 and self.codes == len(self.rows):
            out[:, 0] = _first_minimum(self._product(self.rows, columns))
        else:
            self._by_groups(columns, out)

    def _by_groups(self, columns: Tensor, out: Tensor) -> None:
        minima = _view(self.minima, len(self.rows) // GROUP, columns.shape[1])
        for rows, part in zip(
            self.rows.split(self.codes), minima.split(self.codes // GROUP), strict=True
        ):
            scores = self._product(rows, columns)
            torch.amin(scores.unflatten(0, (-1, GROUP)), 1, out=part)
        # the k nearest codes lie in the k groups with the smallest minima
        if self.k == 1:
            groups = _first_minimum(minima)[:, None]
        else:
            groups = minima.t().topk(self.k, largest=False, sorted=False).indices
        near = self.rows.unflatten(0, (-1, GROUP)).index_select(0, groups.flatten())
        near = near.reshape(len(groups), self.k * GROUP, -1)
        scores = torch.bmm(near, columns.t()[..., None])[..., 0]
        within = _smallest(scores, self.k)
        out.copy_(groups.gather(1, within // GROUP) * GROUP + within % GROUP)

    def _product(self, rows: Tensor, columns: Tensor) -> Float[Tensor, "codes n"]:
        return torch.mm(rows, columns, out=_view(self.scores, len(rows), columns.shape[1]))


def _view(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)


def _smallest(scores: Float[Tensor, "n m"], k: int) -> Int[Tensor, "n {k}"]:
    if k == 1:
        return scores.argmin(-1, keepdim=True)
    return scores.topk(k, largest=False).indices


def _first_minimum(scores: Float[Tensor, "m n"]) -> Int[Tensor, " n"]:
    """`scores.argmin(0)` from operations that torch vectorises; 0 for a column of NaN."""
    m = len(scores)
    if m <= 2 * _LEVEL:
        places = torch.arange(m, device=scores.device)[:, None]
        return places.where(scores <= scores.amin(0), m).amin(0) % m
    full = m // _LEVEL * _LEVEL
    minima = scores[:full].unflatten(0, (-1, _LEVEL)).amin(1)
    if full < m:
        minima = torch.cat([minima, scores[full:].amin(0, keepdim=True)])
    start = _first_minimum(minima) * _LEVEL
    places = torch.arange(_LEVEL, device=scores.device)[:, None] + start
    # in the last, shorter group the last place stands for those that are missing
    return start + _first_minimum(scores.gather(0, places.clamp_(max=m - 1)))
