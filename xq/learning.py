"""When modules may change their statistics."""

import torch
from torch import nn


def is_learning(module: nn.Module) -> bool:
    """Whether state may change: in training, with gradients on, never inside a backward pass.

    So validation under `no_grad` cannot corrupt an average, and what activation checkpointing
    recomputes (with `use_reentrant=False`) is not learned from twice.
    """
    return module.training and torch.is_grad_enabled() and not _in_backward()


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
