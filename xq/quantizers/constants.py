"""Small tensors that every forward pass needs, made once for each device and dtype.

No buffers: `DistributedDataParallel` would send these to all processes at each step, and a module
built on the meta device and loaded with `assign=True` would not have them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_KEPT: dict[Any, Tensor] = {}


def constant(
    make: Callable[..., Tensor], *args: Any, like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """`make(*args, dtype=..., device=...)` for the device and dtype of `like`.

    While a graph is traced it becomes a part of that: whatever stands for a tensor meanwhile must
    not be kept.
    """
    dtype, device = dtype or like.dtype, like.device
    if torch.compiler.is_compiling() or type(like) not in (Tensor, nn.Parameter):
        return make(*args, dtype=dtype, device=device)
    key = make, args, dtype, device
    if key not in _KEPT:
        # a first call may be an evaluation, a later one a training step
        with torch.inference_mode(False):
            _KEPT[key] = make(*args, dtype=dtype, device=device)
    return _KEPT[key]
