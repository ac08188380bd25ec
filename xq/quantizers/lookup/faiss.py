"""Nearest codes by faiss, whose fused kernel outruns torch on a CPU where vectors are short."""

import functools
import importlib.util
import os
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from xq.quantizers.lookup.chunked import nearest_chunked
from xq.quantizers.lookup.table import Table, relative

# faiss (1.15) has a fast kernel for this many numbers or more, and one that is ten times slower
_FAST = 1 << 17
# numbers searched together: 8 MiB of float32
_BLOCK = 1 << 21

# GNU OpenMP, which faiss-cpu brings along, starts no threads after a fork: it waits for them
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def installed() -> bool:
    """Whether `import faiss` would find it."""
    return importlib.util.find_spec("faiss") is not None


def refusal(x: Shaped[Tensor, "*batch dim"]) -> str | None:
    """Why faiss cannot search for vectors such as these, or None."""
    if x.device.type != "cpu":
        return f"it searches on the CPU, the tensors are on {x.device}"
    if x.dtype.itemsize > 4:
        return f"it searches in float32, the tensors are {x.dtype}"
    return None if installed() else "it is not installed: pip install faiss-cpu"


def wins(n: int, k: int, dim: int) -> bool:
    """Whether it is the faster choice for n vectors of length dim and k of their nearest codes."""
    return k == 1 and n * dim * _advantage(dim) >= _FAST


def _advantage(dim: int) -> int:
    """How many times longer torch takes than the fast kernel: so much padding pays."""
    return 4 if dim <= 8 else 2 if dim <= 16 else 1


def nearest_faiss(x: Shaped[Tensor, "n dim"], table: Table, k: int = 1) -> Int[Tensor, "n {k}"]:
    """Indices of the k nearest codes, nearest first, the lower of two equal codes."""
    size, dim = table.codes.shape
    if not table.rows[:size, dim].isfinite().all():
        # faiss knows no code that is infinitely far
        return nearest_chunked(x, table, k)
    # zero added, since -0.0 and 0.0 are equal codes of unequal bits
    points = table.rows[:size, :dim] + 0.0
    out = torch.empty(len(x), k, dtype=torch.int64)
    parts = max(-(-x.numel() // _BLOCK), 1)
    for part, found in zip(x.tensor_split(parts), out.tensor_split(parts), strict=True):
        found.copy_(_search(relative(part, table.metric, table.centre), points, k))
    return _lowest_of_equals(out, points) if k == 1 else out


def _search(x: Float[Tensor, "n dim"], points: Float[Tensor, "k dim"], k: int) -> Tensor:
    import faiss

    n, dim = x.shape
    wanted = -(-_FAST // dim)
    if k == 1 and wanted > n and wins(n, k, dim):
        x = torch.cat([x, x.new_zeros(wanted - n, dim)])
    engine: Any = faiss
    threads = engine.omp_get_max_threads()
    engine.omp_set_num_threads(1 if _forked else torch.get_num_threads())
    try:
        _, found = engine.knn(x.contiguous().numpy(), points.numpy(), k)
    finally:
        engine.omp_set_num_threads(threads)
    # a vector with NaN in it finds nothing, told by -1
    return torch.from_numpy(found[:n]).clamp_(min=0)


def _lowest_of_equals(
    found: Int[Tensor, "n 1"], points: Float[Tensor, "k dim"]
) -> Int[Tensor, "n 1"]:
    """Of several equal codes faiss takes any one; this is the first."""
    numbers, order = _fingerprints(points).sort(stable=True)
    begins = torch.ones(len(points), dtype=torch.bool)
    torch.ne(numbers[1:], numbers[:-1], out=begins[1:])
    if begins.all():
        return found
    first = torch.empty_like(order)
    first[order] = order[begins][begins.cumsum(0) - 1]
    return first[found]


def _fingerprints(points: Float[Tensor, "k dim"]) -> Int[Tensor, " k"]:
    """64 bits a row: alike for equal rows, and by chance for one codebook of 2^20 in 2^25."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (points.shape[1],), generator=generator)
    return (points.view(torch.int32) * factors).sum(-1)
