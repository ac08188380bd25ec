"""How far the running sums of a residual are from its input, all steps together."""

from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from xq.quantizers.base import sample_weight, squared_distance


class RunningFit:
    """The mean of `fit(u, z_k, keep[k])` over steps, where z_k is the sum of the first k codes.

    With weights w_k and their mean m of the z_k, sum_k w_k |u - z_k|^2 is (sum_k w_k) |u - m|^2 and
    terms without u. So one small graph gives the commitment of all steps its gradient.

    Args:
        u: What was quantized; receives the gradient of the commitment.
        keep: For each step the samples that count; all by default.
    """

    def __init__(
        self, u: Float[Tensor, "*batch dim"], keep: Shaped[Tensor, "steps b"] | None
    ) -> None:
        self.u, self.keep, self.fixed = u, keep, u.detach().contiguous()
        self.errors: list[Tensor] = []
        self.weight: Any = 0
        self.weighted = torch.zeros_like(self.fixed)

    def add(self, z: Float[Tensor, "*batch dim"]) -> None:
        """Adds a step; `z` receives the gradient of the codebook term."""
        fixed, weight = z.detach(), None
        if self.keep is None:
            self.weight += 1
        else:
            weight: Any = sample_weight(self.u, self.keep[len(self.errors)])
            self.weight, fixed = self.weight + weight, weight * fixed
        self.errors.append(squared_distance(z, self.fixed, weight))
        self.weighted.add_(fixed)

    def terms(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Commitment and codebook term, which are one number with two gradients."""
        elements: Any = max(self.u.numel(), 1) * len(self.errors)
        error = torch.stack(self.errors).sum() / elements
        if self.keep is None:
            distance = self.weight * squared_distance(self.u, self.weighted / self.weight, None)
        else:
            mean = self.weighted / self.weight.clamp(min=torch.finfo(self.weight.dtype).tiny)
            distance = squared_distance(self.u, mean, self.weight)
        distance = distance / elements
        return error.detach() + (distance - distance.detach()), error


class NoFit:
    """Stands for a `RunningFit` that nobody reads."""

    def __init__(self, u: Float[Tensor, "*batch dim"]) -> None:
        self.zero = u.new_zeros(())

    def add(self, z: Float[Tensor, "*batch dim"]) -> None:
        """Nothing."""

    def terms(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Zeros."""
        return self.zero, self.zero
