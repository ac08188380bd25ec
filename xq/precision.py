"""Work in float32 (or wider), whatever autocast and a module's dtype say."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or as it is if it is wider: half a mantissa flips indices and spoils sums."""
    return x.float() if x.dtype.itemsize < 4 else x


def eager(x: Tensor) -> bool:
    """Whether values may be looked at: not while a graph is traced, nor without data."""
    return not (torch.compiler.is_compiling() or x.is_meta)


def float32_island(device_type: str) -> Any:
    """A context outside autocast and, on CUDA, without TF32."""
    if device_type == "cuda" and not torch.compiler.is_compiling():
        return _full_float32(device_type)
    # only where it is on: an exported graph with an autocast region in it cannot be saved
    # (torch 2.6 cannot trace the first question, which only devices without storage need)
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    if available and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


@contextmanager
def _full_float32(device_type: str) -> Iterator[None]:
    # cuDNN convolutions use TF32 by default, which would move the refinement by 1e-3
    matmul: Any = torch.backends.cuda.matmul
    conv: Any = torch.backends.cudnn
    flag, off = "allow_tf32", False
    if hasattr(matmul, "fp32_precision"):
        # torch 2.9 replaced the flags by these and refuses a mix of both
        conv, flag, off = conv.conv, "fp32_precision", "ieee"
    before = [getattr(backend, flag) for backend in (matmul, conv)]
    try:
        for backend in (matmul, conv):
            setattr(backend, flag, off)
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for backend, value in zip((matmul, conv), before, strict=True):
            setattr(backend, flag, value)


class Float32(nn.Module):
    """A module whose tensors move with `.to()` but are never rounded below float32.

    So `.half()` and `.bfloat16()` models find the same codes and keep their averages; torch's RNNs
    override `_apply` for a like purpose.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32":
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype.itemsize < min(4, tensor.dtype.itemsize):
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_wide, recurse)
