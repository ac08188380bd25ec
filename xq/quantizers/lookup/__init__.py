"""Which code is nearest: one function, one op, several ways to compute it."""

import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from xq.quantizers.lookup import faiss
from xq.quantizers.lookup.chunked import nearest_chunked
from xq.quantizers.lookup.reference import nearest_reference
from xq.quantizers.lookup.table import METRICS, Source, Table, check_codes, check_metric, prepare

__all__ = ["BACKENDS", "METRICS", "Table", "nearest", "prepare"]

BACKENDS = ("chunked", "faiss", "triton", "reference")
# numbers that are copied together of vectors that no view flattens: 8 MiB of float32
_GATHERED = 1 << 21


def nearest(
    x: Shaped[Tensor, "..."],
    codes: Shaped[Tensor, "..."] | Table,
    metric: str = "euclidean",
    *,
    backend: str | None = None,
    k: int | None = None,
) -> Int[Tensor, "..."]:
    """Index of the code nearest to each vector, the first of equal ones. Has no gradient.

    Computed in float32 (float64 for float64), and exact there: where two codes are equally near
    within rounding, either may be returned. Never holds a score for each vector and code. A code
    that is not finite, or whose square is not, is never the nearest; for a vector with NaN the
    index is 0 (with `k`, any), for one with an infinity any.

    Args:
        x: Vectors `(*batch, dim)`.
        codes: `(k, dim)`, at least one, of the dtype and on the device of `x`; or what `prepare`
            made of them.
        metric: "euclidean", or "cosine" for the smallest angle, to which a code of length zero
            counts as 60 degrees away. A table keeps its own.
        backend: "chunked" works everywhere, "faiss" on the CPU where faiss-cpu is installed,
            "triton" on GPUs; "reference" is the definition, for tests. By default the environment's
            `XQ_LOOKUP`, or else what is fastest for these tensors.
        k: Adds an axis with the k nearest codes, nearest first, equal ones in any order.

    Raises:
        ValueError: If an argument does not fit, or the backend asked for cannot do it.

    Examples:
        >>> nearest(torch.tensor([[0.9, 0.1]]), torch.eye(2))
        tensor([0])
        >>> nearest(torch.tensor([[0.9, 0.1]]), torch.eye(2), k=2)
        tensor([[0, 1]])
    """
    if backend is not None:
        _check_name("backend", backend)
    given = codes.codes if isinstance(codes, Table) else codes
    _check_tensors(x, given)
    if k is not None and not (hasattr(k, "__index__") and 1 <= k <= len(given)):
        raise ValueError(f"nearest finds 1 to {len(given)} of {len(given)} codes, got k={k}")
    if isinstance(codes, Table):
        if metric not in ("euclidean", codes.metric):
            raise ValueError(f"nearest got metric={metric!r} and a table for {codes.metric!r}")
        rows, centre, metric = codes.rows, codes.centre, codes.metric
    else:
        rows, centre = None, None
        check_metric(metric)
    found = torch.ops.xq.nearest(
        x.detach(), given.detach(), metric, rows, centre, k or 1, backend or ""
    )
    return found[..., 0] if k is None else found


def _check_tensors(x: Tensor, codes: Tensor) -> None:
    check_codes(codes)
    if x.ndim == 0 or x.shape[-1] != codes.shape[1]:
        raise ValueError(
            f"nearest expects x (..., dim) and codes (k, dim), "
            f"got {tuple(x.shape)} and {tuple(codes.shape)}"
        )
    if x.dtype != codes.dtype or x.device != codes.device:
        raise ValueError(
            f"nearest expects x and codes alike, got {x.dtype} on {x.device} and {codes.dtype} on "
            f"{codes.device}; codes.to(x) makes them so"
        )


def _check_name(source: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r} is none of {BACKENDS}")


def _backend_for(x: Tensor, size: int, k: int, asked: str) -> str:
    """The backend asked for, which must be able to, or the fastest."""
    source, name = ("backend", asked) if asked else ("XQ_LOOKUP", os.environ.get("XQ_LOOKUP", ""))
    if not name:
        return _fastest(x, size, k)
    _check_name(source, name)
    reason = _refusal(name, x, k)
    if reason is not None:
        raise ValueError(f"{source}={name!r} does not do for this search: {reason}")
    return name


def _refusal(name: str, x: Tensor, k: int) -> str | None:
    """Why this backend cannot search for vectors such as `x`, or None."""
    if name == "faiss":
        return faiss.refusal(x)
    if name == "triton":
        return _triton_refusal(x, k)
    return None


def _triton_refusal(x: Tensor, k: int) -> str | None:
    if k > 1:
        return f"it finds one code, not k={k}"
    # triton is large: imported only where it could work
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it searches on a GPU, the tensors are on cpu"
    if not _has_triton():
        return "it is not installed: pip install triton"
    from xq.quantizers.lookup import triton

    return triton.refusal(x)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _fastest(x: Tensor, size: int, k: int) -> str:
    if x.device.type != "cpu" and _triton_refusal(x, k) is None:
        return "triton"
    if faiss.wins(x.numel() // x.shape[-1], size, x.shape[-1], k) and faiss.refusal(x) is None:
        return "faiss"
    return "chunked"


def _search(
    x: Tensor,
    codes: Tensor,
    metric: str,
    rows: Tensor | None,
    centre: Tensor | None,
    k: int,
    backend: str,
) -> Tensor:
    search = _SEARCHES[_backend_for(x, len(codes), k, backend)]
    source = Source(codes, metric, rows, centre)
    if x.ndim < 3 or x.numel() == 0 or _flattens(x):
        return search(x.reshape(-1, x.shape[-1]), source, k).view(*x.shape[:-1], k)
    out = torch.empty(*x.shape[:-1], k, dtype=torch.int64, device=x.device)
    for part, found in _flat_parts(x, out):
        found.copy_(search(part, source, k))
    return out


def _nearest_chunked(x: Tensor, source: Source, k: int) -> Tensor:
    return nearest_chunked(x, source.table, k)


def _nearest_triton(x: Tensor, source: Source, k: int) -> Tensor:
    from xq.quantizers.lookup.triton import nearest_triton

    rows, centre = source.table.rows, source.table.centre
    return nearest_triton(x, rows, centre, source.metric == "cosine")[:, None]


_SEARCHES: dict[str, Any] = {
    "chunked": _nearest_chunked,
    "faiss": faiss.nearest_faiss,
    "triton": _nearest_triton,
    "reference": nearest_reference,
}


def _flat_parts(x: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of matrices that make up both, without a copy of more than a part of `x`."""
    if x.ndim > 2 and x[0].numel() > _GATHERED:
        for part, found in zip(x, out, strict=True):
            yield from _flat_parts(part, found)
    else:
        size = max(_GATHERED // max(x[0].numel(), 1), 1)
        for part, found in zip(x.split(size), out.split(size), strict=True):
            yield part.reshape(-1, x.shape[-1]), found.view(-1, out.shape[-1])


def _flattens(x: Tensor) -> bool:
    """Whether all axes but the last are one, as strides go."""
    sizes, strides = x.shape[:-1], x.stride()[:-1]
    return all(
        strides[i] == strides[i + 1] * sizes[i + 1] or sizes[i] == 1 for i in range(len(sizes) - 1)
    )


def _search_fake(
    x: Tensor,
    codes: Tensor,
    metric: str,
    rows: Tensor | None,
    centre: Tensor | None,
    k: int,
    backend: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], k, dtype=torch.int64)


# define and impl, since the first call of a custom_op imports the compiler (two seconds)
_LIBRARY = torch.library.Library("xq", "DEF")
_LIBRARY.define(
    "nearest(Tensor x, Tensor codes, str metric, Tensor? rows, Tensor? centre, int k, str backend)"
    " -> Tensor"
)
_LIBRARY.impl("nearest", _search, "CompositeExplicitAutograd")
torch.library.register_fake("xq::nearest", _search_fake, lib=_LIBRARY)
