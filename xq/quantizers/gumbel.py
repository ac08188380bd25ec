"""GumbelVQ: codes drawn from a softmax, and mixed softly while training."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from xq.quantizers.base import Depth, Losses, Quantized, Quantizer
from xq.quantizers.estimators import passthrough
from xq.quantizers.gradient_codebook import GradientCodebook
from xq.quantizers.sampling import checked_temperature


class GumbelVQ(Quantizer):
    """Draws codes by Gumbel-softmax (Jang et al. 2017; DALL-E's dVAE, Ramesh et al. 2021).

    A linear map gives each vector a score for each code. In training mode with gradients, `z` is
    the mean of all codes under the softmax of scores and Gumbel noise over `temperature`, and
    `indices` are the best of these noisy scores. Otherwise, in eval mode above all, there is no
    noise and `z` is the code of the best score. So `decode(indices)` equals `z` in eval mode, and
    in training with `hard=True` alone. It needs memory for all scores of a batch.

    The regularizer is the divergence of the softmax of the scores from even use, a mean over
    tokens, in nats (taming-transformers' `kl_weight` is 5e-4). There is no other loss. GumbelVQ may
    stand at the root or in a product, but is no step of a residual.

    Args:
        dim: Channels of the input and of the codes, which start standard normal.
        codebook_size: Number of codes.
        temperature: Of the soft choice, above 0; the attribute may follow a schedule.
        hard: Whether `z` is the drawn code in training too, with the gradient of the soft one.
        generator: Source of the noise, on the input's device; torch's own by default, as it must be
            for activation checkpointing and compiled graphs. Copies have their own in its state.

    Raises:
        ValueError: If a size is below 1, or the temperature not above 0.

    Examples:
        >>> gumbel = GumbelVQ(32, 256, temperature=1.0)
        >>> z, indices, losses = gumbel(torch.randn(2, 64, 32))
        >>> gumbel.temperature = 0.9  # as it cools down
        >>> loss = losses.total(regularizer=5e-4)
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        temperature: float = 1.0,
        hard: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.codebook_size = dim, codebook_size
        self.temperature = checked_temperature("GumbelVQ", temperature)
        self.hard, self.generator = hard, generator
        self.codebook = GradientCodebook(codebook_size, dim)
        self.scores = nn.Linear(dim, codebook_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws new codes and a new map."""
        nn.init.normal_(self.codebook.weight)
        self.scores.reset_parameters()

    def quantize(self, u: Float[Tensor, "*batch dim"], depth: Depth = None) -> Quantized:
        codes, scores = self.codebook.codes(), self._scores(u)
        draws = self.training and torch.is_grad_enabled()
        noisy = scores + _gumbel(scores, self.generator) if draws else scores
        indices = noisy.argmax(-1)
        regularizer = zero = u.new_zeros(())
        if draws:
            regularizer = _divergence_from_even(scores)
        z = self._mixed(noisy, indices, codes.to(u.dtype), soft=draws and not self.hard)
        return Quantized(z, indices, Losses(zero, zero, regularizer))

    def _mixed(self, scores: Tensor, indices: Tensor, codes: Tensor, *, soft: bool) -> Tensor:
        if soft:
            return (scores / self.temperature).softmax(-1) @ codes
        hard = F.embedding(indices, codes)
        if not torch.is_grad_enabled():
            return hard
        mean = (scores / self.temperature).softmax(-1) @ codes.detach()
        return hard + (mean - mean.detach())

    def dequantize(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        return F.embedding(indices, self.codebook.codes())

    def estimate(
        self, u: Float[Tensor, "*batch dim"], z: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        return passthrough(u, z)

    def _scores(self, u: Tensor) -> Float[Tensor, "*batch codebook_size"]:
        return F.linear(u, self.scores.weight.to(u.dtype), self.scores.bias.to(u.dtype))

    @property
    def estimators(self) -> Any:
        return passthrough

    @property
    def noisy(self) -> bool:
        return True

    def config(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "codebook_size": self.codebook_size,
            "temperature": self.temperature,
            "hard": self.hard,
        }

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.codebook_size}, temperature={self.temperature}, hard={self.hard}"


def _gumbel(scores: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.empty_like(scores, requires_grad=False)
    # an exponential variable is zero once in 2^24 draws, where its logarithm were infinite
    noise.exponential_(generator=generator).clamp_(min=torch.finfo(scores.dtype).tiny)
    return -noise.log()


def _divergence_from_even(scores: Float[Tensor, "*batch codes"]) -> Float[Tensor, ""]:
    """Of the softmax of scores, a mean over tokens; zero for none."""
    log_p = scores.log_softmax(-1)
    tokens: Any = max(scores.shape[:-1].numel(), 1)
    return (log_p.exp() * (log_p + math.log(scores.shape[-1]))).sum() / tokens
