"""Which code is nearest: one function, one op, several ways to compute it."""

import os

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from xq.quantizers.lookup.chunked import nearest_chunked
from xq.quantizers.lookup.reference import nearest_reference

METRICS = ("euclidean", "cosine")
BACKENDS = {"chunked": nearest_chunked, "reference": nearest_reference}


def nearest(
    x: Shaped[Tensor, "..."],
    codes: Shaped[Tensor, "..."],
    metric: str = "euclidean",
    *,
    backend: str | None = None,
) -> Int[Tensor, "..."]:
    """Index of the code nearest to each vector, the lowest on ties. Has no gradient.

    Args:
        x: Vectors `(*batch, dim)`; the search runs in their precision.
        codes: `(k, dim)`, at least one, of the dtype and on the device of `x`.
        metric: "euclidean", or "cosine" for the smallest angle.
        backend: "chunked" or "reference"; by default the environment's `XQ_LOOKUP`, or else
            chunked.

    Raises:
        ValueError: If an argument does not fit.
    """
    _check_backend(backend, "backend")
    if metric not in METRICS:
        raise ValueError(f"nearest knows the metrics {METRICS}, got {metric!r}")
    if codes.ndim != 2 or len(codes) == 0 or x.ndim == 0 or x.shape[-1] != codes.shape[1]:
        raise ValueError(
            f"nearest expects x (..., dim) and codes (k >= 1, dim), "
            f"got {tuple(x.shape)} and {tuple(codes.shape)}"
        )
    if not x.is_floating_point() or x.dtype != codes.dtype or x.device != codes.device:
        raise ValueError(
            f"nearest expects floating-point x and codes alike, got {x.dtype} on {x.device} "
            f"and {codes.dtype} on {codes.device}"
        )
    flat = x.detach().reshape(-1, x.shape[-1])
    found = torch.ops.xq.nearest(flat, codes.detach(), metric, backend or "")
    return found.reshape(x.shape[:-1])


def _check_backend(backend: str | None, source: str) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{source}={backend!r} is none of {tuple(BACKENDS)}")


def _nearest(x: Tensor, codes: Tensor, metric: str, backend: str) -> Tensor:
    if not backend:
        backend = os.environ.get("XQ_LOOKUP", "chunked")
        _check_backend(backend, "XQ_LOOKUP")
    return BACKENDS[backend](x, codes, metric)


def _nearest_fake(x: Tensor, codes: Tensor, metric: str, backend: str) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)


# define and impl, since the first call of a custom_op imports the compiler (two seconds)
_LIBRARY = torch.library.Library("xq", "DEF")
_LIBRARY.define("nearest(Tensor x, Tensor codes, str metric, str backend) -> Tensor")
_LIBRARY.impl("nearest", _nearest, "CompositeExplicitAutograd")
torch.library.register_fake("xq::nearest", _nearest_fake, lib=_LIBRARY)
