"""Nearest codes by faiss, whose fused kernel outruns torch on a CPU where vectors are short."""

import functools
import importlib.util
import os
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from xq.quantizers.lookup.chunked import nearest_chunked
from xq.quantizers.lookup.table import Source, relative

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
    return n * dim * (_advantage(dim) if k == 1 else 1) >= _FAST


def _advantage(dim: int) -> int:
    """How many times longer torch takes than the fast kernel: as much padding pays."""
    return 6 if dim <= 8 else 4 if dim <= 16 else 2 if dim <= 32 else 1


def nearest_faiss(x: Shaped[Tensor, "n dim"], source: Source, k: int) -> Int[Tensor, "n {k}"]:
    """Indices of the k nearest codes, nearest first, the lower of two equal codes."""
    codes = _points(source)
    if codes is None:
        return nearest_chunked(x, source.table, k)
    points, centre = codes
    found = [
        _search(_relative(part, source.metric, centre), points, k)
        for part in x.tensor_split(max(-(-x.numel() // _BLOCK), 1))
    ]
    out = torch.cat(found) if len(found) > 1 else found[0]
    return _lowest_of_equals(out, points) if k == 1 else out


def _relative(x: Tensor, metric: str, centre: Tensor | None) -> Float[Tensor, "n dim"]:
    return x.float() if centre is None else relative(x, metric, centre)


def _points(source: Source) -> tuple[Tensor, Tensor | None] | None:
    """The codes, and what they are relative to; None if some are not finite.

    faiss knows no code that is infinitely far.
    """
    if not source.is_ready and source.metric == "euclidean":
        codes = source.codes.float().contiguous()
        # around the origin already, so that no digits are lost; false for what is not finite
        if _power(codes.numpy().mean(0)) <= _power(codes.numpy()) / len(codes) / 4:
            return codes, None
    size, dim = source.codes.shape
    rows, centre = source.table.rows[:size], source.table.centre
    return (rows[:, :dim].contiguous(), centre) if rows[:, dim].isfinite().all() else None


def _power(array: np.ndarray) -> float:
    # numpy has no threads, which would still wait for more work when those of faiss start
    with np.errstate(all="ignore"):
        return float(np.einsum("i,i->", array.ravel(), array.ravel()))


def _search(x: Float[Tensor, "n dim"], points: Float[Tensor, "k dim"], k: int) -> Tensor:
    import faiss

    n, dim = x.shape
    wanted = -(-_FAST // dim)
    if n < wanted and wins(n, k, dim):
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
    # equal codes are equally long, and few others are
    array = points.numpy()
    doubtful = _first_of_equals(torch.from_numpy(np.einsum("ki,ki->k", array, array)))
    places = torch.arange(len(points))
    moved = (doubtful != places).nonzero()[:, 0]
    if len(moved) == 0:
        return found
    group = torch.cat([doubtful[moved], moved]).unique()
    # zero added, since -0.0 and 0.0 are equal of unequal bits
    places[group] = group[_first_of_equals(_fingerprints(points[group] + 0.0))]
    return places[found]


def _first_of_equals(keys: Shaped[Tensor, " k"]) -> Int[Tensor, " k"]:
    """For each key the place of the first that equals it."""
    ordered, order = keys.sort(stable=True)
    begins = torch.ones(len(keys), dtype=torch.bool)
    torch.ne(ordered[1:], ordered[:-1], out=begins[1:])
    first = torch.empty_like(order)
    first[order] = order[begins][begins.cumsum(0) - 1]
    return first


def _fingerprints(points: Float[Tensor, "k dim"]) -> Int[Tensor, " k"]:
    """64 bits a row: alike for equal rows, and by chance for one codebook of 2^20 in 2^25."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**63), 2**63 - 1, (points.shape[1],), generator=generator)
    return (points.view(torch.int32) * factors).sum(-1)
