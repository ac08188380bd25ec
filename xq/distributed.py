"""The one place that talks to other processes; every function is a no-op when alone.

Whether there are others is asked at each call, never cached. A module compiled and called before
`init_process_group` stays single-process. `group` is a process group of torch.distributed; None is
the default one.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor


class SharedGroup:
    """Holds a process group for a module: its copies share the group, pickles refuse it."""

    def __init__(self, group: Any = None) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> "SharedGroup":
        return self

    def __reduce__(self) -> Any:
        if self.group is None:
            return SharedGroup, ()
        raise TypeError(
            "a module with a process_group of its own cannot be pickled: save its state_dict()"
        )


def world_size(group: Any = None) -> int:
    """How many processes take part; 1 without a process group."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Any = None) -> int:
    """The number of this process in the group; 0 without one."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def all_reduce_sum_(tensors: Sequence[Tensor], group: Any = None) -> None:
    """Sums each tensor over all processes, in place: one collective for all of one dtype."""
    if not tensors or world_size(group) == 1:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        alike = [t for t in tensors if t.dtype == dtype]
        flat = torch.cat([t.reshape(-1) for t in alike])
        dist.all_reduce(flat, group=group)
        for tensor, summed in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
            tensor.copy_(summed.view_as(tensor))


@torch.no_grad()
def broadcast_(tensors: Sequence[Tensor], group: Any = None) -> None:
    """Gives each tensor, in place, the values it has on the first process."""
    if world_size(group) == 1:
        return
    first = 0 if group is None else dist.get_global_rank(group, 0)
    for tensor in tensors:
        dist.broadcast(tensor, first, group=group)


@torch.no_grad()
def gather_rows(x: Float[Tensor, "n dim"], most: int, group: Any = None) -> Float[Tensor, "m dim"]:
    """Rows of all processes, evenly picked so that they are about `most` at most; alike on each.

    Waits for the other processes and for the device: not for a training step.
    """
    counts = torch.zeros(world_size(group), dtype=torch.int64, device=x.device)
    counts[rank(group)] = len(x)
    all_reduce_sum_([counts], group)
    total = int(counts.sum())
    shares = [min(n, -(-n * most // max(total, 1))) for n in counts.tolist()]
    own = shares[rank(group)]
    x = x[torch.arange(own, device=x.device) * len(x) // max(own, 1)]
    if world_size(group) == 1:
        return x
    # padded to one size, since gathering of uneven tensors is not in every backend
    padded = x.new_zeros(max(shares), x.shape[1])
    padded[:own] = x
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:n] for part, n in zip(parts, shares, strict=True)])


def sum_over_processes(x: Tensor, group: Any = None) -> Tensor:
    """The sum of `x` over all processes, differentiable: each process gets the whole gradient."""
    if world_size(group) == 1:
        return x
    return _Sum.apply(x, group)  # pyright: ignore[reportReturnType]


class _Sum(torch.autograd.Function):
    # torch's own functional all_reduce warns without autograd and breaks full graphs with it
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def gather_with_gradient(
    x: Float[Tensor, " b *shape"], group: Any = None
) -> Float[Tensor, " global_b *shape"]:
    """The rows of all processes, in the order of their ranks, differentiable.

    The gradient of a row is the sum over processes of what each found for it.

    Raises:
        ValueError: If the processes do not bring equally many rows. On a GPU, and in a compiled
            graph, where nobody looks, it is a failed assertion of the device.
    """
    if world_size(group) == 1:
        return x
    _check_alike(x, group)
    return _Gather.apply(x, group)  # pyright: ignore[reportReturnType]


def _check_alike(x: Tensor, group: Any) -> None:
    """Refuses unequal numbers of rows, for which a collective would wait or read rubbish."""
    length = torch.full((1,), len(x), dtype=torch.int64, device=x.device)
    lengths = length.new_empty(world_size(group))
    dist.all_gather_into_tensor(lengths, length, group=group)
    way_out = "pad the smaller batches and pass keep=False for the padding, or drop the last batch"
    if torch.compiler.is_compiling() or x.is_cuda:
        message = f"processes bring batches of different sizes, here {len(x)}; {way_out}"
        check: Any = torch.ops.aten._assert_async.msg
        check((lengths == length).all(), message)
    elif (lengths != length).any():
        raise ValueError(f"processes bring batches of sizes {lengths.tolist()}; {way_out}")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group, ctx.length = group, len(x)
        rows = x.new_empty(world_size(group) * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(rows, x.contiguous(), group=group)
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        # not every backend can reduce and scatter
        grad = grads[0].clone()
        dist.all_reduce(grad, group=ctx.group)
        first = rank(ctx.group) * ctx.length
        return grad[first : first + ctx.length], None


def sharded_like(full: Shaped[Tensor, "..."], tensor: Tensor) -> Tensor:
    """`full`, which is alike on all processes, laid out as the parameter `tensor` is.

    A plain parameter gets it as it is, a sharded one (FSDP2) the rows of this process.
    """
    mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)
    if mesh is None:
        return full
    from torch.distributed.tensor import distribute_tensor

    # None: no process sends anything, since all have the same
    return distribute_tensor(full, mesh, placements, src_data_rank=None)
