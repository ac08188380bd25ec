"""LFQ and BSQ: the signs of the channels are the code."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xq.quantizers.base import Depth, Losses, Quantized, Quantizer, fit
from xq.quantizers.bits import MAX_BITS, indices_to_signs, signs_to_indices
from xq.quantizers.entropy import CodeEntropy, check_group_size, sign_entropy
from xq.quantizers.flips import cheapest_flips


class _SignQuantizer(Quantizer):
    """Rounds each channel to plus or minus `scale`; zero counts as negative, as in all peers.

    Bit i of an index is channel i, the lowest first (as in XQ-GAN and Open-MAGVIT2; BSQ-ViT and
    vector-quantize-pytorch put channel 0 highest).
    """

    shrink = 0.5
    scale: float

    def __init__(
        self,
        dim: int,
        *,
        temperature: float,
        group_size: int | None,
        regularize: bool,
        across_processes: bool,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not 1 <= dim <= MAX_BITS:
            raise ValueError(
                f"{name} needs 1 to {MAX_BITS} channels, since 2**dim codes must fit int64, "
                f"got dim={dim}; ProductQuantizer splits more channels over several indices"
            )
        if temperature <= 0:
            raise ValueError(f"{name} needs a positive temperature, got {temperature}")
        if regularize:
            try:
                check_group_size(dim, group_size)
            except ValueError as error:
                raise ValueError(f"{name}: {error}, or regularize=False") from None
        self.dim, self.codebook_size = dim, 2**dim
        self.temperature, self.group_size = temperature, group_size
        self.regularize, self.across_processes = regularize, across_processes

    def quantize(self, u: Float[Tensor, "*batch dim"], depth: Depth = None) -> Quantized:
        z, indices, losses = self._chosen(u)
        fitted = fit(u, z, learned=False)
        losses = Losses(fitted.commitment, fitted.codebook, losses.regularizer)
        return Quantized(z, indices, losses)

    def choose(self, u: Float[Tensor, "*batch dim"]) -> Quantized:
        return self._chosen(u)

    def _chosen(self, u: Tensor) -> Quantized:
        signs = u > 0
        regularizer = zero = u.new_zeros(())
        if self.regularize and self.training and torch.is_grad_enabled():
            regularizer = self.entropy(u).penalty()
        z = self._codes(signs, u.dtype)
        return Quantized(z, signs_to_indices(signs), Losses(zero, zero, regularizer))

    def candidates(self, u: Float[Tensor, "*batch dim"], k: int) -> Int[Tensor, "*batch near"]:
        flips = cheapest_flips(u.abs(), min(k, self.codebook_size))
        return signs_to_indices((u > 0)[..., None, :] ^ flips)

    def dequantize(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        return self._codes(indices_to_signs(indices, self.dim), torch.float32)

    def _codes(self, signs: Bool[Tensor, "*batch dim"], dtype: torch.dtype) -> Tensor:
        return signs.to(dtype).mul_(2 * self.scale).sub_(self.scale)

    def entropy(self, u: Float[Tensor, "*batch dim"]) -> CodeEntropy:
        """Entropies of the soft assignment of `u` (bounded) to all 2^dim codes, in nats.

        The assignment is the softmax of `-|u - code|^2 / temperature`.
        """
        logits = u * (4 * self.scale / self.temperature)
        return sign_entropy(logits, self.group_size, across_processes=self.across_processes)

    @property
    def regularizes(self) -> bool:
        return self.regularize

    def config(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "temperature": self.temperature,
            "group_size": self.group_size,
            "regularize": self.regularize,
            "across_processes": self.across_processes,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.config().items())


class LFQ(_SignQuantizer):
    """Lookup-free quantization: codes of +-1 (Yu et al. 2024, MAGVIT-v2, section 3.1).

    The regularizer is the entropy penalty, in training mode with gradients.

    Args:
        dim: Channels, so bits an index, 1 to 62.
        bound: "tanh" maps the input into (-1, 1) first. Without it a small model collapses: the
            commitment of an unbounded input has no floor to push against.
        temperature: Of the soft assignment in the entropies, above 0.
        group_size: See `sign_entropy`; needed above 24 channels.
        regularize: Whether to compute the entropy penalty; where its weight is zero, without it a
            step is faster.
        across_processes: Whether the batch entropy is that of all processes, at the price of a
            reduction a step; otherwise it is that of each.

    Raises:
        ValueError: If an argument lies outside its range.

    Examples:
        >>> lfq = LFQ(18)
        >>> z, indices, losses = lfq(torch.randn(2, 256, 18))
        >>> lfq.codebook_size, indices.shape
        (262144, torch.Size([2, 256]))
        >>> loss = losses.total(commitment=0.25, regularizer=0.1)
    """

    scale = 1.0

    def __init__(
        self,
        dim: int,
        *,
        bound: str | None = None,
        temperature: float = 1.0,
        group_size: int | None = None,
        regularize: bool = True,
        across_processes: bool = True,
    ) -> None:
        super().__init__(
            dim,
            temperature=temperature,
            group_size=group_size,
            regularize=regularize,
            across_processes=across_processes,
        )
        if bound not in (None, "tanh"):
            raise ValueError(f'LFQ knows the bounds None and "tanh", got bound={bound!r}')
        self.bounded = bound == "tanh"

    def bound(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return x.tanh() if self.bounded else x

    @property
    def domain(self) -> str:
        return "cube" if self.bounded else "real"

    def config(self) -> dict[str, Any]:
        return {**super().config(), "bound": "tanh" if self.bounded else None}


class BSQ(_SignQuantizer):
    """Binary spherical quantization: corners of a cube in the unit sphere (Zhao et al. 2024).

    The input is normalized to unit length, codes are +-1 / sqrt(dim). Inside a residual only the
    input is normalized, not what is left of it after a step, as in XQ-GAN.

    Args:
        dim: Channels, so bits an index, 1 to 62.
        temperature: Of the soft assignment in the entropies, above 0.
        group_size: See `sign_entropy`; needed above 24 channels.
        regularize: Whether to compute the entropy penalty; where its weight is zero, without it a
            step is faster.
        across_processes: Whether the batch entropy is that of all processes, at the price of a
            reduction a step; otherwise it is that of each.

    Raises:
        ValueError: If an argument lies outside its range.

    Examples:
        >>> bsq = BSQ(36, group_size=9)
        >>> z, indices, losses = bsq(torch.randn(2, 256, 36))
        >>> torch.allclose(z.norm(dim=-1), torch.ones(2, 256))
        True
    """

    def __init__(
        self,
        dim: int,
        *,
        temperature: float = 1.0,
        group_size: int | None = None,
        regularize: bool = True,
        across_processes: bool = True,
    ) -> None:
        super().__init__(
            dim,
            temperature=temperature,
            group_size=group_size,
            regularize=regularize,
            across_processes=across_processes,
        )
        self.scale = 1 / math.sqrt(dim)

    def bound(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return F.normalize(x, dim=-1)

    @property
    def domain(self) -> str:
        return "sphere"
