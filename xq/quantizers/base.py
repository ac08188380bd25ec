"""The protocol that every quantizer obeys, leaf or composite: one forward, written once."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, SupportsIndex, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.utils import _pytree

from xq.precision import Float32, float32_island, widen
from xq.pretrained import Pretrained
from xq.quantizers.checks import check_finite, check_input, checked_depth, checked_indices
from xq.quantizers.codebook import finish_learning, start_learning
from xq.quantizers.estimators import straight_through
from xq.quantizers.memo import one_call

Scales = tuple[int | tuple[int, int], ...]
# what callers may write for them: sides or (h, w) pairs, in any sequence
ScalesLike = Sequence[SupportsIndex | Sequence[SupportsIndex]]
Depth = int | Shaped[Tensor, " b"] | None


class Losses(NamedTuple):
    """Unweighted scalar losses; a term that a quantizer lacks is zero.

    Attributes:
        commitment: Mean squared error that moves the input towards its code.
        codebook: The same error, moving the code (and the refinement of a pyramid) towards its
            input; zero where no parameter learns from it.
        regularizer: Shapes how codes are used: the entropy penalty of LFQ, BSQ, IBQ and, if asked
            for, VQ, or the divergence of GumbelVQ; in nats.

    Examples:
        >>> losses = VQ(4, 16)(torch.randn(2, 7, 4)).losses
        >>> loss = losses.total(commitment=0.5)
        >>> losses._fields
        ('commitment', 'codebook', 'regularizer')
    """

    commitment: Float[Tensor, ""]
    codebook: Float[Tensor, ""]
    regularizer: Float[Tensor, ""]

    def total(
        self, *, commitment: float = 0.25, codebook: float = 1.0, regularizer: float = 0.1
    ) -> Float[Tensor, ""]:
        """The weighted sum that a training loop adds to its reconstruction loss.

        Args:
            commitment: Weight of what moves inputs to codes; beta of VQ-VAE.
            codebook: Weight of what moves codes to inputs.
            regularizer: Weight of what shapes the use of codes, such as the entropy penalty.
        """
        return (
            commitment * self.commitment + codebook * self.codebook + regularizer * self.regularizer
        )


class Quantized(NamedTuple):
    """What every quantizer returns.

    Attributes:
        z: The quantized input, with the estimator's gradient: shape and dtype of the input.
        indices: int64, token shape followed by the quantizer's `code_shape`.
        losses: See `Losses`.
    """

    z: Float[Tensor, "*batch dim"]
    indices: Int[Tensor, "..."]
    losses: Losses


# so that an exported quantizer can be saved to a file
for _named in (Losses, Quantized):
    _pytree._register_namedtuple(_named, serialized_type_name=f"xq.quantizers.{_named.__name__}")


def fit(
    u: Float[Tensor, "*batch dim"],
    z: Float[Tensor, "*batch dim"],
    keep: Shaped[Tensor, " b"] | None = None,
    *,
    learned: bool = True,
) -> Losses:
    """How far `z` is from `u`, seen from both sides (van den Oord et al. 2017, equation 3).

    Args:
        u: What was quantized; receives the gradient of the commitment.
        z: Its code, or a running sum of codes; receives the gradient of the codebook term.
        keep: Samples (first axis) that count; all by default. Means run over these alone.
        learned: Whether any parameter shapes `z`; if not, the codebook term is zero.
    """
    zero, weight = u.new_zeros(()), sample_weight(u, keep)
    elements: Any = max(u.numel(), 1)
    to_code = squared_distance(u, z.detach(), weight) / elements
    to_input = squared_distance(z, u.detach(), weight) / elements if learned else zero
    return Losses(to_code, to_input, zero)


def sample_weight(u: Tensor, keep: Tensor | None) -> Tensor | None:
    """What turns a mean over all samples into one over those kept; None for all."""
    if keep is None:
        return None
    keep = keep.to(u.dtype)
    return expand(keep * (len(keep) / keep.sum().clamp(min=1)), u)


def squared_distance(a: Tensor, b: Tensor, weight: Tensor | None) -> Float[Tensor, ""]:
    """The sum over all elements, weighted by sample."""
    if weight is None:
        return F.mse_loss(a, b, reduction="sum")
    return (weight * F.mse_loss(a, b, reduction="none")).sum()


def expand(
    per_sample: Shaped[Tensor, " b"], like: Shaped[Tensor, "b ..."]
) -> Shaped[Tensor, "b ..."]:
    """Views a value a sample so that it broadcasts over `like`."""
    return per_sample.reshape(-1, *[1] * (like.ndim - 1))


def as_grids(scales: Scales) -> tuple[tuple[int, int], ...]:
    """Sides and `(h, w)` pairs, all as pairs."""
    return tuple((s, s) if isinstance(s, int) else s for s in scales)


def _classes_up(cls: type, name: str) -> int:
    """How many classes up `name` is defined."""
    return next(i for i, base in enumerate(cls.__mro__) if name in vars(base))


class Quantizer(Float32, Pretrained, ABC):
    """Maps vectors to codes and back.

    A new leaf sets `dim` and `codebook_size` and writes `quantize` and `dequantize`, and `bound`
    if its codes live in a domain. A composite writes the same by calling its children's. Nobody
    overrides `forward`, `encode` or `decode`: what must happen exactly once however deep the nest
    (float32, the bound, the gradient estimator, codebook updates) happens there, at the root.

    Attributes:
        dim: Channels of the input (last axis) and of `z`.
        codebook_size: How many values each index can take.
        code_shape: Shape of one token's indices; `()` for a leaf.
        scales: Token grids, sides or `(h, w)`, coarse to fine; `()` is the input's own grid.
        depth: Steps of the outermost residual; 1 if there is none.
        step_axis: Where those steps lie in `code_shape`; -1 for the token axis of a pyramid, None
            if there are none. `decode` takes fewer leading ones.
        shrink: By how much what is left after one application is smaller than the input, as a
            flat residual should scale its next step: a number, or one a channel.
    """

    dim: int
    codebook_size: int
    code_shape: tuple[int, ...] = ()
    scales: Scales = ()
    depth: int = 1
    step_axis: int | None = None
    shrink: float | tuple[float, ...] = 1.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # who writes `quantize` anew inherits none of the shortcuts around the former one
        for shortcut in ("choose", "candidates", "regularizes"):
            if _classes_up(cls, "quantize") < _classes_up(cls, shortcut):
                setattr(cls, shortcut, vars(Quantizer)[shortcut])

    @abstractmethod
    def quantize(self, u: Float[Tensor, "*batch dim"], depth: Depth = None) -> Quantized:
        """Codes of `u`, which `bound` has already seen. `z` carries gradients to the codes only."""

    def choose(self, u: Float[Tensor, "*batch dim"]) -> Quantized:
        """`quantize` where nobody reads commitment and codebook loss, which may then be zero.

        So do `encode` and a residual, which measures its own sums. Only worth writing for speed.
        """
        return self.quantize(u)

    def candidates(self, u: Float[Tensor, "*batch dim"], k: int) -> Int[Tensor, "..."]:
        """Indices of up to `k` codes near `u`, the one of `quantize` first, on an axis after batch.

        What `beam_encode` tries and `Perturbed` draws from; by default that one code alone.
        """
        return self.choose(u).indices.unsqueeze(u.ndim - 1)

    @abstractmethod
    def dequantize(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "*batch dim"]:
        """The `z` that `quantize` gave with these indices."""

    def dequantize_steps(
        self, indices: Int[Tensor, "..."]
    ) -> Iterator[Float[Tensor, "*batch dim"]]:
        """`dequantize` after each step of the outermost residual; once where there is none."""
        yield self.dequantize(indices)

    def bound(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Differentiable map onto the codes' domain; the identity by default."""
        return x

    def estimate(
        self, u: Float[Tensor, "*batch dim"], z: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        """How gradients cross: the value of `z`, a gradient to `u`; straight through by default."""
        return straight_through(u, z)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON; `xq.config.build` reads them back."""
        raise NotImplementedError(
            f"{type(self).__name__} has no config(): return its constructor's arguments as a dict"
        )

    @property
    def domain(self) -> str:
        """Names what `bound` maps onto; the steps of a residual must share one."""
        return "real" if type(self).bound is Quantizer.bound else type(self).__name__

    @property
    def estimators(self) -> Any:
        """Names what `estimate` does; the steps of a residual must agree."""
        overridden = type(self).estimate is not Quantizer.estimate
        return type(self).estimate if overridden else straight_through

    @property
    def regularizes(self) -> bool:
        """Whether the regularizer may have a gradient to the input; False lets residuals hurry."""
        return True

    @property
    def commits(self) -> bool:
        """Whether a commitment loss helps; where not (FSQ), a residual has none either."""
        return True

    @property
    def noisy(self) -> bool:
        """Whether training with gradients draws at random.

        Then and only then `encode` may give other indices than `forward`, or `decode` another `z`.
        """
        return False

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """`scales` as `(h, w)` pairs."""
        return as_grids(self.scales)

    @property
    def num_tokens(self) -> int:
        """Tokens an image of a quantizer with `scales`.

        Raises:
            ValueError: If it has no scales.
        """
        if not self.scales:
            raise ValueError(
                f"{type(self).__name__} has no scales: it makes as many tokens as its input has"
            )
        return sum(h * w for h, w in self.grids)

    @property
    def bits(self) -> float:
        """Bits a token."""
        return math.prod(self.code_shape) * math.log2(self.codebook_size)

    @final
    def forward(self, x: Shaped[Tensor, "..."], depth: Any = None) -> Quantized:
        """Quantizes floating-point vectors `(*batch, dim)`.

        Args:
            x: The vectors; `(b, h, w, dim)` for a quantizer with `scales`.
            depth: How many steps of the outermost residual to keep: one number, or `(b,)`
                integers, one a sample (not checked, since that would synchronize). All by default.

        Raises:
            ValueError: If `x` or `depth` does not fit.
        """
        check_input(self, x)
        depth = checked_depth(self, depth, x)
        with float32_island(x.device.type), one_call():
            codebooks = start_learning(self)
            u = self.bound(widen(x))
            z, indices, losses = self.quantize(u, depth)
            z = self.estimate(u, z)
            finish_learning(codebooks)
        return Quantized(z.to(x.dtype), indices, losses)

    @final
    @torch.no_grad()
    def encode(self, x: Shaped[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The indices of `x`; never changes any state, in training mode either.

        Raises:
            ValueError: If `x` does not fit, or (outside compiled graphs) is not finite.
        """
        check_input(self, x)
        check_finite(self, x)
        with float32_island(x.device.type), one_call():
            return self.choose(self.bound(widen(x))).indices

    @final
    def decode(self, indices: Shaped[Tensor, "..."]) -> Float[Tensor, "*batch dim"]:
        """The `z` of `indices`, bit for bit; leading steps or whole scales alone are fine.

        Args:
            indices: Integers of any width, as `forward` and `encode` return them.

        Raises:
            ValueError: If their shape does not fit, or (outside compiled graphs) their range.
        """
        indices = checked_indices(self, indices)
        with float32_island(indices.device.type), one_call():
            return self.dequantize(indices)

    @final
    def partials(self, indices: Shaped[Tensor, "..."]) -> Iterator[Float[Tensor, "*batch dim"]]:
        """Reconstructions after each step or scale; the last one is `decode(indices)`."""
        return self._partials(checked_indices(self, indices))

    def _partials(self, indices: Tensor) -> Iterator[Tensor]:
        steps = self.dequantize_steps(indices)
        while True:
            # leaves the island before it yields: the caller's code runs under its own autocast
            with float32_island(indices.device.type), one_call():
                z = next(steps, None)
            if z is None:
                return
            yield z

    def with_scales(self, scales: ScalesLike) -> "Quantizer":
        """The same modules at another resolution.

        Args:
            scales: Sides or `(h, w)` pairs, coarse to fine, as many as there are.

        Raises:
            ValueError: If this quantizer has no scales.
        """
        raise ValueError(
            f"{type(self).__name__} has no scales, so with_scales({scales}) has nothing to change: "
            "it takes inputs of any size"
        )
