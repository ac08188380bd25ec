"""Sums over all pairs of a contrast, in bounded memory."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from xq.precision import float32_island

# logits in flight: 4 MiB of float32, on a GPU 128 MiB
_LOGITS, _LOGITS_GPU = 1 << 20, 1 << 25


def sum_of_pairs(
    teacher: Float[Tensor, "p n dim"],
    student: Float[Tensor, "p n dim"],
    kept: Bool[Tensor, " b"],
    all_kept: Bool[Tensor, " n"],
    own: slice,
) -> Float[Tensor, ""]:
    """Over kept images of this process: -log softmax of the other side's own, both ways.

    Args:
        teacher: Of all processes' images, each position a contrast of its own; scaled so that
            products with the student's are logits.
        student: The same.
        kept: Images of this process that count.
        all_kept: Those of all processes.
        own: Where the images of this process stand among all.
    """
    if len(kept) == len(all_kept) and teacher.shape[0] * len(kept) ** 2 <= _limit(teacher):
        return _Square.apply(teacher, student, kept)  # pyright: ignore[reportReturnType]
    total: Any = _Pairs.apply(teacher[:, own], student, kept, all_kept, own.start)
    return total + _Pairs.apply(student[:, own], teacher, kept, all_kept, own.start)


class _Square(torch.autograd.Function):
    """Both directions of `_Pairs` from the same logits, where these are few and of one process."""

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, kept: Tensor) -> Tensor:
        logits = (teacher @ student.mT).masked_fill_(~(kept & kept[:, None]), -math.inf)
        rows, columns = logits.logsumexp(-1), logits.logsumexp(-2)
        own = logits.diagonal(dim1=-2, dim2=-1)
        ctx.save_for_backward(teacher, student, kept, logits, rows, columns)
        return (rows + columns - 2 * own).where(kept, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> Any:
        teacher, student, kept, logits, rows, columns = ctx.saved_tensors
        with float32_island(teacher.device.type):
            slope = (logits - rows.unsqueeze(-1)).exp_()
            slope += (logits - columns.unsqueeze(-2)).exp_()
            slope.diagonal(dim1=-2, dim2=-1).sub_(2)
            slope = slope.masked_fill_(~(kept & kept[:, None]), 0).mul_(grads[0])
            return slope @ student, slope.mT @ teacher, None


class _Pairs(torch.autograd.Function):
    """Sum of -log softmax of each query's own key among all kept keys, in blocks of logits."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, kept: Tensor, all_kept: Tensor, first: int
    ) -> Tensor:
        normalizers, total = [], queries.new_zeros(())
        for positions, rows in _blocks(queries, keys):
            logits = _logits(queries[positions, rows], keys[positions], all_kept)
            normalizers.append(logits.logsumexp(-1))
            own = logits.diagonal(first + rows.start, dim1=-2, dim2=-1)
            total = total + (normalizers[-1] - own).where(kept[rows], 0).sum()
        ctx.save_for_backward(queries, keys, kept, all_kept, *normalizers)
        ctx.first = first
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> Any:
        queries, keys, kept, all_kept, *normalizers = ctx.saved_tensors
        of_queries, of_keys = torch.zeros_like(queries), torch.zeros_like(keys)
        with float32_island(queries.device.type):
            for (positions, rows), z in zip(_blocks(queries, keys), normalizers, strict=True):
                block = queries[positions, rows]
                logits = _logits(block, keys[positions], all_kept)
                # of logits: the probabilities, less 1 at the own key
                slope = (logits - z.unsqueeze(-1)).exp_()
                slope.diagonal(ctx.first + rows.start, dim1=-2, dim2=-1).sub_(1)
                slope = slope.masked_fill_(~kept[rows].unsqueeze(-1), 0).mul_(grads[0])
                of_queries[positions, rows] = slope @ keys[positions]
                of_keys[positions] += slope.mT @ block
        return of_queries, of_keys, None, None, None


def _logits(
    queries: Float[Tensor, "p r dim"], keys: Float[Tensor, "p n dim"], kept: Bool[Tensor, " n"]
) -> Float[Tensor, "p r n"]:
    return (queries @ keys.mT).masked_fill_(~kept, -math.inf)


def _limit(like: Tensor) -> int:
    return _LOGITS if like.device.type == "cpu" else _LOGITS_GPU


def _blocks(queries: Tensor, keys: Tensor) -> list[tuple[slice, slice]]:
    """Positions and rows of queries whose logits are few enough; whole positions where it fits."""
    positions, rows, columns = *queries.shape[:2], keys.shape[1]
    limit = _limit(queries)
    row_step = min(max(limit // max(columns, 1), 1), max(rows, 1))
    step = max(limit // max(row_step * columns, 1), 1)
    # a list, since compiled graphs take no generators
    return [
        (slice(p, min(p + step, positions)), slice(r, min(r + row_step, rows)))
        for p in range(0, positions, step)
        for r in range(0, rows, row_step)
    ]
