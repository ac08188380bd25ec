"""How processes train together: each with all weights (DDP), or each with its share (FSDP2)."""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.learning import Average
from xq.distributed import sharded_like
from xq.quantizers import GradientCodebook, revive_in


def in_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """The module under data parallelism; itself where one process is alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return module
    # running statistics are kept alike by xq, at its own time
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    if device.type == "cuda":
        options["device_ids"] = [device.index]
    return DistributedDataParallel(module, **options)


def check_sharding(device: torch.device) -> None:
    """Refuses `run.fsdp` where it cannot be.

    Raises:
        ValueError: If it cannot.
    """
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError(
            f"run.fsdp: torch {torch.__version__} shares weights out on GPUs alone; take a newer "
            "torch, or leave it out"
        )


def share_out_(learner: Any, device: torch.device) -> None:
    """Leaves each process its share of the weights, in place; one process alone has it all.

    Those of a block are whole only while it works, the others during a step. Optimizers are made
    afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    tokenizer = learner.tokenizer
    last = getattr(tokenizer.decoder, "last_layer", None)
    for part in (tokenizer.encoder, tokenizer.decoder):
        for block in _blocks(part):
            # what makes the pixels stays whole till its gradient is asked for
            if not any(p is last for p in block.parameters()):
                fully_shard(block, mesh=mesh)
    fully_shard(learner, mesh=mesh)


def _blocks(part: nn.Module) -> Iterator[nn.Module]:
    """What is called one after the other: blocks of transformers, levels of convolutions."""
    for child in part.children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            # but for single layers
            yield from (block for block in child if next(block.children(), None) is not None)
        else:
            yield from _blocks(child)


@contextlib.contextmanager
def waiting(module: Any) -> Iterator[None]:
    """Within it, gradients wait for a later micro-batch before they go to other processes."""
    if not hasattr(module, "set_requires_gradient_sync"):
        with getattr(module, "no_sync", contextlib.nullcontext)():
            yield
        return
    module.set_requires_gradient_sync(False)
    module.set_is_last_backward(False)
    yield
    module.set_requires_gradient_sync(True)
    module.set_is_last_backward(True)


def revive_after_steps(optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
    """Lets dead codes start again where it lasts: within a forward they are copies."""
    if any(isinstance(part, GradientCodebook) and part.revives for part in module.modules()):
        revive_in(optimizer, module)


def gathered(state: Any, keep: bool = True) -> Any:
    """A nested state with whole tensors in place of shared ones, on the CPU.

    Every process must ask; None in place of those where they are not kept.
    """
    if isinstance(state, dict):
        return {key: gathered(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value, keep) for value in state]
    if not hasattr(state, "full_tensor"):
        return state
    # one after the other, so that the device never has them all
    whole = state.full_tensor()
    return whole.cpu() if keep else None


def load_optimizer_(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads the state of whole parameters, of which each process takes what it has of them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = {
        i: {k: sharded_like(v, parameters[i]) if v.ndim else v for k, v in each.items()}
        for i, each in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": found})


class SharedAverage(Average):
    """An average of which each process keeps its share.

    Args:
        average: The whole one.
        module: Whose average it is, shared out.
    """

    def __init__(self, average: Average, module: nn.Module) -> None:
        self.decay, now = average.decay, module.state_dict()
        self.shares = {
            # a copy, since a share of a whole tensor would hold all its memory
            name: sharded_like(value, now[name]).clone()
            for name, value in average.module.state_dict().items()
        }
        self.device = next(iter(self.shares.values())).device
        self._form = average.module.cpu()

    def means(self) -> dict[str, Tensor]:
        """By name, shared out."""
        return self.shares

    def whole(self) -> Any:
        """A module with the averages; every process must ask."""
        module = copy.deepcopy(self._form)
        module.load_state_dict(gathered(self.shares))
        return module.to(self.device)
