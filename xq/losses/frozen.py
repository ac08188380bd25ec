"""Pretrained networks that losses look through: they move, but never learn and are never saved."""

from typing import Any

from torch import nn


class Frozen(nn.Module):
    """A module as a constant: its weights are buffers outside the saved state.

    So `.to()` moves them, while no optimizer, no `requires_grad_(True)`, no gradient reduction and
    no checkpoint finds them. Evaluation mode is kept whatever `.train()` says. Gradients pass
    through it to its input.

    Args:
        module: What to freeze; it is taken over, parameters and all.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        freeze_(module)
        self.module = module

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def freeze_(module: nn.Module) -> None:
    """Puts a module into evaluation mode and makes its weights buffers outside the saved state."""
    for part in module.eval().modules():
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        for name, tensor in tensors:
            delattr(part, name)
            part.register_buffer(name, tensor.detach(), persistent=False)
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            # or its loading would look for the number of batches
            part.track_running_stats = False
