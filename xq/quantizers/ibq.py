"""IBQ: the index itself carries the gradient, to all codes."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from xq.quantizers.base import Depth, Losses, Quantized, Quantizer, fit
from xq.quantizers.blocks import block_length, exact
from xq.quantizers.entropy import CodeEntropy
from xq.quantizers.estimators import passthrough
from xq.quantizers.gradient_codebook import GradientCodebook
from xq.quantizers.lookup import Table, nearest, prepare
from xq.quantizers.memo import once
from xq.quantizers.sampling import checked_temperature
from xq.quantizers.usage_entropy import refuse, softmax_backward, softmax_entropy


class IBQ(Quantizer):
    """Index back-propagation quantization, IBQ (Shi et al. 2024, section 3).

    The code with the largest dot product is chosen. Backward, the choice counts as the softmax over
    all dot products: so the gradient of `z` reaches the input through the scores of all codes, and
    every code. `z` itself is the hard code. As these gradients belong to one choice, IBQ may stand
    at the root or in a product, but is no step of a residual.

    The paper's double quantization loss is `losses` and the error of `z` with its gradient:
    `losses.total(commitment=1.0, codebook=0.25, regularizer=0.05) + F.mse_loss(z, x)`, where 0.25
    (its beta) weighs the codebook term.

    Args:
        dim: Channels of the input and of the codes, which start standard normal.
        codebook_size: Number of codes.
        entropy_temperature: Of the softmax in the regularizer, the penalty of `CodeEntropy`; None
            for no regularizer.
        across_processes: Whether its batch entropy is that of all processes, at the price of a
            reduction a step; otherwise it is that of each.

    Raises:
        ValueError: If a size is below 1, or the temperature not above 0.

    Examples:
        >>> ibq, x = IBQ(32, 1024), torch.randn(2, 64, 32)
        >>> z, indices, losses = ibq(x)
        >>> loss = losses.total(commitment=1.0, codebook=0.25, regularizer=0.05) + F.mse_loss(z, x)
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        entropy_temperature: float | None = 0.01,
        across_processes: bool = True,
    ) -> None:
        super().__init__()
        if entropy_temperature is not None:
            checked_temperature("IBQ's entropy", entropy_temperature)
        self.dim, self.codebook_size = dim, codebook_size
        self.entropy_temperature = entropy_temperature
        self.across_processes = across_processes
        self.codebook = GradientCodebook(codebook_size, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new codes: so long that dot products tell them apart from the start."""
        nn.init.normal_(self.codebook.weight)

    def quantize(self, u: Float[Tensor, "*batch dim"], depth: Depth = None) -> Quantized:
        z, indices, losses = self.choose(u)
        # the hard codes alone; what moves all codes is the gradient of `z`
        fitted = fit(u, F.embedding(indices, self._codes(u)))
        losses = Losses(fitted.commitment, fitted.codebook, losses.regularizer)
        return Quantized(z, indices, losses)

    def choose(self, u: Float[Tensor, "*batch dim"]) -> Quantized:
        codes = self._codes(u)
        indices = nearest(u, once(self._searchable, u.dtype), backend="chunked")
        z = torch.ops.xq.propagated(u, codes, F.embedding(indices, codes))
        regularizer = zero = u.new_zeros(())
        if self.regularizes and self.training and torch.is_grad_enabled():
            regularizer = self.entropy(u).penalty()
        return Quantized(z, indices, Losses(zero, zero, regularizer))

    def dequantize(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        return F.embedding(indices, self.codebook.codes())

    def estimate(
        self, u: Float[Tensor, "*batch dim"], z: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        return passthrough(u, z)

    def entropy(self, u: Float[Tensor, "*batch dim"]) -> CodeEntropy:
        """Entropies of the softmax of `u @ codes.T / entropy_temperature`, in nats.

        Raises:
            ValueError: If `entropy_temperature` is None.
        """
        if self.entropy_temperature is None:
            raise ValueError(
                "IBQ.entropy needs an entropy_temperature, got None; 0.01 is published"
            )
        codes = self._codes(u)
        u = u.reshape(-1, self.dim) / self.entropy_temperature
        none = codes.new_zeros(len(codes))
        return softmax_entropy(u, codes, none, across_processes=self.across_processes)

    def _codes(self, u: Tensor) -> Float[Tensor, "codebook_size dim"]:
        return self.codebook.codes().to(u.dtype)

    def _searchable(self, dtype: torch.dtype) -> Table:
        return _for_products(self.codebook.codes().to(dtype))

    @property
    def estimators(self) -> Any:
        return passthrough

    @property
    def regularizes(self) -> bool:
        return self.entropy_temperature is not None

    def config(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "codebook_size": self.codebook_size,
            "entropy_temperature": self.entropy_temperature,
            "across_processes": self.across_processes,
        }

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.codebook_size}, entropy_temperature={self.entropy_temperature}"


@torch.no_grad()
def _for_products(codes: Tensor) -> Table:
    """A table in which the nearest code is that with the largest dot product."""
    codes = codes.detach()
    table, (size, dim) = prepare(codes), codes.shape
    broken = table.rows[:size, dim : dim + 1] == torch.inf
    table.rows[:size, :dim] = codes.masked_fill(broken, 0)
    # half the squared lengths: what a distance has beyond the product
    table.rows[:size, dim].masked_fill_(~broken[:, 0], 0)
    return Table(codes, table.metric, table.rows, torch.zeros_like(table.centre))


def _propagated(u: Tensor, codes: Tensor, hard: Tensor) -> Tensor:
    """`hard`; its gradient also goes the way of the mean code, `softmax(u @ codes.T) @ codes`."""
    return hard.clone()


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _propagated_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, codes = ctx.saved_tensors
    flat = u.reshape(-1, u.shape[-1])
    to_u, to_codes = torch.ops.xq.propagate(flat, codes, grad.reshape(flat.shape))
    return to_u.view(u.shape), to_codes, grad


@exact
def _propagate(u: Tensor, codes: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of z to vectors and codes by way of the scores, a block of vectors at a time."""
    to_u, to_codes = torch.empty_like(u), torch.zeros_like(codes)
    length = block_length(codes)
    blocks = zip(u.split(length), grad.split(length), to_u.split(length), strict=True)
    for part, grad_part, out in blocks:
        p = (part @ codes.t()).softmax(-1)
        to_scores = softmax_backward(p, grad_part @ codes.t())
        torch.mm(to_scores, codes, out=out)
        to_codes.addmm_(to_scores.t(), part)
    return to_u, to_codes


def _propagate_fake(u: Tensor, codes: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), torch.empty_like(codes)


def _propagated_fake(u: Tensor, codes: Tensor, hard: Tensor) -> Tensor:
    return torch.empty_like(hard)


# ops, so that a compiler keeps no scores for the backward pass
_LIBRARY = torch.library.Library("xq", "FRAGMENT")
_LIBRARY.define("propagate(Tensor u, Tensor codes, Tensor grad) -> (Tensor, Tensor)")
_LIBRARY.impl("propagate", _propagate, "CompositeExplicitAutograd")
torch.library.register_fake("xq::propagate", _propagate_fake, lib=_LIBRARY)
_LIBRARY.define("propagated(Tensor u, Tensor codes, Tensor hard) -> Tensor")
_LIBRARY.impl("propagated", _propagated, "CompositeExplicitAutograd")
torch.library.register_fake("xq::propagated", _propagated_fake, lib=_LIBRARY)
torch.library.register_autograd(
    "xq::propagated", _propagated_gradient, setup_context=_save, lib=_LIBRARY
)
torch.library.register_autograd("xq::propagate", refuse, lib=_LIBRARY)
