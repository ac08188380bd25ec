"""What a quantizer asks of its input, depth and indices; errors name the way out.

Values are looked at in eager `encode` and `decode` alone: elsewhere that would synchronize.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from xq.precision import eager

if TYPE_CHECKING:
    from xq.quantizers.base import Depth, Quantizer


def check_input(q: "Quantizer", x: Tensor) -> None:
    """Raises a `ValueError` unless `x` has a dtype and shape that `q` takes."""
    name = type(q).__name__
    if not x.is_floating_point():
        raise ValueError(
            f"{name} expects floating-point vectors, got {x.dtype}; "
            "indices go to decode(), images to float first"
        )
    if x.ndim == 0 or x.shape[-1] != q.dim:
        channel_first = x.ndim > 2 and x.shape[1] == q.dim
        hint = "wrap it in "
        if channel_first:
            hint += f"ChannelFirst({name}(...)) for channel-first input"
        else:
            hint += f"Projected({name}(...), channels) for another number of channels"
        raise ValueError(
            f"{name} expects {q.dim} channels in the last axis, got shape {tuple(x.shape)}; {hint}"
        )
    if q.scales and (x.ndim != 4 or tuple(x.shape[1:3]) != q.grids[-1]):
        h, w = q.grids[-1]
        raise ValueError(
            f"{name} with scales {q.scales} expects shape (b, {h}, {w}, {q.dim}), "
            f"got {tuple(x.shape)}; with_scales(...) gives the same weights another resolution"
        )


def check_finite(q: "Quantizer", x: Tensor) -> None:
    """Raises a `ValueError` if `x` has NaN or infinity in it."""
    if eager(x) and not x.isfinite().all():
        raise ValueError(
            f"{type(q).__name__}.encode got {int((~x.isfinite()).sum())} values that are NaN or "
            f"infinite, among {x.numel()}; look for the layer that made them"
        )


def checked_depth(q: "Quantizer", depth: Any, x: Tensor) -> "Depth":
    """`depth`; raises a `ValueError` unless it is None, in 1..q.depth, or one integer a sample."""
    if depth is None:
        return None
    name = type(q).__name__
    if x.ndim < 2:
        raise ValueError(f"{name} needs a batch axis to apply depth, got shape {tuple(x.shape)}")
    if isinstance(depth, Tensor):
        if depth.shape != x.shape[:1] or depth.is_floating_point() or depth.dtype == torch.bool:
            raise ValueError(
                f"{name} expects depth as one integer a sample, shape ({x.shape[0]},), "
                f"got {depth.dtype} of shape {tuple(depth.shape)}"
            )
        return depth
    if not hasattr(depth, "__index__") or not 1 <= int(depth) <= q.depth:
        raise ValueError(
            f"{name} has depths 1 to {q.depth}, or a tensor with one a sample, got depth={depth!r}"
        )
    return int(depth)


def checked_indices(q: "Quantizer", indices: Tensor) -> Int[Tensor, "..."]:
    """`indices` in int64; raises a `ValueError` unless `q` could have made them."""
    name = type(q).__name__
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise ValueError(f"{name}.decode expects integer indices, got {indices.dtype}")
    _check_index_shape(q, tuple(indices.shape))
    indices = indices.long()
    if eager(indices) and indices.numel():
        low, high = (int(v) for v in torch.aminmax(indices))
        if low < 0 or high >= q.codebook_size:
            raise ValueError(
                f"{name}.decode expects indices in 0..{q.codebook_size - 1}, "
                f"got {low}..{high}; were they made by a quantizer of another size?"
            )
    return indices


def _check_index_shape(q: "Quantizer", shape: tuple[int, ...]) -> None:
    token_axes = len(shape) - len(q.code_shape)
    fits = token_axes >= 0 and all(
        got == want or (axis == q.step_axis and 1 <= got < want)
        for axis, (got, want) in enumerate(zip(shape[token_axes:], q.code_shape, strict=True))
    )
    if q.scales and fits:
        fits = token_axes == 2 and shape[1] in _token_counts(q)
    if not fits:
        grid = ("b", q.num_tokens) if q.scales else ("...",)
        want = ", ".join(str(n) for n in (*grid, *q.code_shape))
        prefixes = {None: "", -1: ", or those of some leading scales"}
        prefix = prefixes.get(q.step_axis, ", or fewer leading steps")
        raise ValueError(
            f"{type(q).__name__}.decode expects indices of shape ({want}){prefix}, got {shape}"
        )


def _token_counts(q: "Quantizer") -> list[int]:
    """How many tokens `decode` takes: those of any leading scales, if these are its steps."""
    if q.step_axis != -1:
        return [q.num_tokens]
    sizes = [h * w for h, w in q.grids]
    return [sum(sizes[: k + 1]) for k in range(len(sizes))]
