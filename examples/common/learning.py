"""Optimizers as tokenizers want them: what decays, how the rate moves, how weights are averaged."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from xq.quantizers import Codebook

# of linear maps and convolutions; tokens, positions and embeddings have other names or owners
_MATRICES = ("weight", "weight_orig")


def make_optimizer(
    module: nn.Module, lr: float, betas: tuple[float, float], decay: float
) -> torch.optim.AdamW:
    """AdamW in which matrices and kernels decay, and nothing else does.

    So codebooks, norms, biases, tokens, positions and embeddings stay as they are but for their
    gradients.
    """
    decaying, others = [], []
    kept = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, Codebook | nn.Embedding)
        for parameter in part.parameters()
    }
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = parameter.ndim > 1 and name.rpartition(".")[2] in _MATRICES
        (decaying if matrix and id(parameter) not in kept else others).append(parameter)
    groups = [
        {"params": decaying, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas)


def scaled(lr: float, batch: int, lr_batch: int) -> float:
    """A learning rate for `lr_batch` pictures, for `batch` of them."""
    return lr * batch / lr_batch if lr_batch else lr


def cosine_rate(
    step: int, *, first: int, last: int, warmup: int, rates: tuple[float, float, float]
) -> float:
    """Linear up, then along a cosine down.

    Args:
        step: Which.
        first: The step that it begins with.
        last: The step after the last.
        warmup: Steps of the rise.
        rates: Where the rise begins, the highest, and where it ends.
    """
    low, peak, end = rates
    done = step - first
    if done < warmup:
        return low + (peak - low) * done / warmup
    share = min((done - warmup) / max(last - first - warmup, 1), 1.0)
    return end + (peak - end) * (1 + math.cos(math.pi * share)) / 2


def clip_(module: nn.Module, most: float) -> Tensor:
    """Scales gradients so that their joint norm is `most` at most (0: any); what it was."""
    gradients = [p for p in module.parameters() if p.grad is not None]
    norm: Any = nn.utils.clip_grad_norm_(gradients, most or math.inf)
    # of weights that are shared out
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


class Average:
    """A copy of a module whose weights are running averages, in eval mode.

    Floating-point buffers, such as codes that are running means themselves, are averaged too;
    counters are copied. In the first steps the average forgets faster, so that it is of use in a
    short training: the decay is `(1 + step) / (10 + step)` until that exceeds the given one.

    Args:
        module: Whose weights.
        decay: What is kept of the average at each step.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"optimizer.ema is a decay in [0, 1), got {decay}")
        self.module: Any = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves towards the module's weights, after step number `step`, from 0."""
        rate = 1 - min(self.decay, (1 + step) / (10 + step))
        now, means = _own(module.state_dict()), _own(self.means())
        floats = [key for key, value in means.items() if value.is_floating_point()]
        torch._foreach_lerp_([means[k] for k in floats], [now[k] for k in floats], rate)
        for key in means.keys() - set(floats):
            means[key].copy_(now[key])

    def means(self) -> dict[str, Tensor]:
        """By name, for checkpoints."""
        return self.module.state_dict()

    def whole(self) -> Any:
        """A module with the averages."""
        return self.module


def _own(state: dict[str, Any]) -> dict[str, Tensor]:
    """What this process has of tensors that are shared out."""
    return {k: v.to_local() if hasattr(v, "to_local") else v for k, v in state.items()}
