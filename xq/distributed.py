"""The one place that talks to other processes; every function is a no-op when alone.

Whether there are others is asked at each call, never cached. A module compiled and called before
`init_process_group` stays single-process.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many processes take part; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def all_reduce_sum_(tensors: Sequence[Tensor]) -> None:
    """Sums each tensor over all processes, in place: one collective for all of one dtype."""
    if not tensors or world_size() == 1:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        group = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in group])
        dist.all_reduce(flat)
        for tensor, summed in zip(group, flat.split([t.numel() for t in group]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, differentiable: each process gets the whole gradient."""
    return x if world_size() == 1 else _Sum.apply(x)  # pyright: ignore[reportReturnType]


class _Sum(torch.autograd.Function):
    # torch's own functional all_reduce warns without autograd and breaks full graphs with it
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        dist.all_reduce(grad)
        return grad
