"""DiVeQ: an estimator that errs as far as the quantizer does, in about its direction."""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xq.quantizers.estimators import straight_through


class DiVeQ(nn.Module):
    """Moves the input as far as its code lies, in a direction that noise turns a little.

    Vali et al. 2025, "DiVeQ: Differentiable Vector Quantization Using the Reparameterization
    Trick": `u + |z - u| * direction`, where `direction` is that of `z - u` plus Gaussian noise and
    has no gradient. The distance has one, to the input and to the codes, which so learn from the
    reconstruction alone: the paper trains with `losses.total(commitment=0, codebook=0)`.

    For `VQ(estimator=DiVeQ())`. As every estimator it acts once, at the root, of a residual too.
    In training mode with gradients the `z` of `forward` therefore differs from `decode(indices)`,
    though the indices do not; otherwise it is the code bit for bit, straight through.

    Args:
        variance: Of the noise in each channel, in the units of the input; the default is
            vector-quantize-pytorch's.
        generator: Source of the noise, on the input's device, which copies of this module share;
            torch's own by default, as it must be for activation checkpointing and compiled graphs.

    Raises:
        ValueError: If `variance` is negative or not finite.

    Examples:
        >>> vq = VQ(8, 512, estimator=DiVeQ())
        >>> loss = vq(torch.randn(2, 64, 8)).losses.total(commitment=0.0, codebook=0.0)
    """

    # what `forward` returns in training depends on chance
    noisy = True

    def __init__(
        self, variance: float = 0.005, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if not 0 <= variance < math.inf:
            raise ValueError(f"DiVeQ needs a finite variance of 0 or more, got {variance}")
        self.variance, self.generator = variance, generator

    def forward(
        self, u: Float[Tensor, "*batch dim"], z: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        if not (self.training and torch.is_grad_enabled()):
            return straight_through(u, z)
        error = z - u
        noise = torch.randn(u.shape, generator=self.generator, dtype=u.dtype, device=u.device)
        direction = F.normalize(error.detach() + math.sqrt(self.variance) * noise, dim=-1)
        return u + error.norm(dim=-1, keepdim=True) * direction

    def __deepcopy__(self, memo: dict[int, Any]) -> "DiVeQ":
        # branches with generators in equal states would draw equal noise
        memo[id(self.generator)] = self.generator
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, without the generator, which no file keeps."""
        return {"variance": self.variance}

    def extra_repr(self) -> str:
        return f"variance={self.variance}"
