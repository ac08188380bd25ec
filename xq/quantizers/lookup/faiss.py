"""Nearest codes by faiss, whose fused kernel outruns torch on a CPU where vectors are short."""

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from xq.quantizers.lookup.chunked import nearest_chunked
from xq.quantizers.lookup.table import SAMPLE, Source, relative

# faiss (1.15) has a fast kernel for this many numbers or more, and one that is ten times slower
_FAST = 1 << 17
# so many codes, too long for its fused kernel, it multiplies no faster than torch
_MANY = 1 << 12
# numbers searched together: 8 MiB of float32
_BLOCK = 1 << 21

# for more codes, to sort their lengths takes three times as long as to drop them in slots
_SORTED = 1 << 11
# 20 MiB of slots for many codes; and 2**64 over the golden ratio, which spreads numbers over them
_MOST_SLOTS, _MIXER = 22, 0x9E3779B97F4A7C15

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


def wins(n: int, size: int, dim: int, k: int) -> bool:
    """Whether it is the faster choice for the k nearest of `size` codes to n vectors."""
    if 32 < dim <= 64 and size >= _MANY:
        return False
    return n * dim * (_advantage(dim) if k == 1 else 1) >= _FAST


def _advantage(dim: int) -> int:
    """How many times longer torch takes than the fast kernel: as much padding pays."""
    return 4 if dim <= 8 else 2 if dim <= 16 else 1


class _Points(NamedTuple):
    """Codes as faiss takes them."""

    codes: Float[Tensor, "k dim"]
    # squared; with numpy, which has no threads: torch's would still wait for more work, and be in
    # the way, when those of faiss start
    lengths: np.ndarray
    # what the codes are relative to, if not to the origin
    centre: Float[Tensor, " dim"] | None


def nearest_faiss(x: Shaped[Tensor, "n dim"], source: Source, k: int) -> Int[Tensor, "n {k}"]:
    """Indices of the k nearest codes, nearest first; of one the first of codes that are equal."""
    points = _points(source)
    if points is None:
        return nearest_chunked(x, source.table, k)
    found = [
        _search(_relative(part, source.metric, points.centre), points.codes, k)
        for part in x.tensor_split(max(-(-x.numel() // _BLOCK), 1))
    ]
    out = torch.cat(found) if len(found) > 1 else found[0]
    return _first_of_equals(out, points) if k == 1 else out


def _relative(
    x: Shaped[Tensor, "n dim"], metric: str, centre: Tensor | None
) -> Float[Tensor, "n dim"]:
    return x.float() if centre is None else relative(x, metric, centre)


def _points(source: Source) -> _Points | None:
    """The codes made ready; None if some are not finite: to faiss none is infinitely far."""
    if not source.is_ready and source.metric == "euclidean":
        codes = source.codes.float().contiguous()
        with np.errstate(all="ignore"):
            lengths = _squared_lengths(codes)
        if np.isfinite(lengths).all():
            some = slice(None, None, max(len(codes) // SAMPLE, 1))
            centre = _median(codes.numpy()[some])
            # around the origin already, so that no digits are lost
            if centre @ centre <= _median(lengths[some]) / 4:
                return _Points(codes, lengths, None)
    size, dim = source.codes.shape
    rows = source.table.rows[:size]
    if not rows[:, dim].isfinite().all():
        return None
    codes = rows[:, :dim].contiguous()
    return _Points(codes, _squared_lengths(codes), source.table.centre)


def _median(rows: np.ndarray) -> Any:
    half = len(rows) // 2
    return np.partition(rows, half, axis=0)[half]


def _squared_lengths(codes: Float[Tensor, "k dim"]) -> np.ndarray:
    return np.einsum("ki,ki->k", codes.numpy(), codes.numpy())


def _search(x: Float[Tensor, "n dim"], points: Float[Tensor, "k dim"], k: int) -> Tensor:
    import faiss

    n, dim = x.shape
    wanted = -(-_FAST // dim)
    if n < wanted and wins(n, len(points), dim, k):
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


def _first_of_equals(found: Int[Tensor, "n 1"], points: _Points) -> Int[Tensor, "n 1"]:
    """Of several equal codes faiss takes any one; this is the first."""
    codes, doubtful = points.codes.numpy(), _repeated(points.lengths)
    if len(doubtful) == 0:
        return found
    _, first, which = np.unique(
        _fingerprints(codes[doubtful]), return_index=True, return_inverse=True
    )
    if len(first) == len(doubtful):
        return found
    places, same = np.arange(len(codes)), doubtful[first[which]]
    # equal fingerprints are no proof
    places[doubtful] = np.where((codes[doubtful] == codes[same]).all(1), same, doubtful)
    return torch.from_numpy(places[found.numpy()])


def _repeated(numbers: np.ndarray) -> np.ndarray:
    """Places of all numbers that occur more than once."""
    few = len(numbers) <= _SORTED
    places = np.arange(len(numbers)) if few else _sharing(numbers)
    ordered = np.sort(numbers[places])
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    return places[np.isin(numbers[places], again)] if len(again) else places[:0]


def _sharing(numbers: np.ndarray) -> np.ndarray:
    """Places of all numbers that share a slot of a hash table: equal ones, and by chance a few."""
    bits = min(len(numbers).bit_length() + 3, _MOST_SLOTS)
    slots = numbers.view(np.uint32) * np.uint64(_MIXER) >> np.uint64(64 - bits)
    slots, places = slots.astype(np.intp), np.arange(len(numbers), dtype=np.int32)
    last = np.empty(1 << bits, np.int32)
    last[slots] = places
    shared = np.zeros(1 << bits, bool)
    shared[slots[last[slots] != places]] = True
    return np.flatnonzero(shared[slots])


def _fingerprints(codes: np.ndarray) -> np.ndarray:
    """A number for each row, alike for equal rows and seldom else."""
    factors = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, codes.shape[1])
    # zero added, since -0.0 and 0.0 are equal but for their bits
    return (codes + 0.0).view(np.int32) @ factors
