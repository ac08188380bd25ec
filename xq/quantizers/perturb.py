"""Perturbed: decoders learn to live with tokens that are nearly right."""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xq.config import describe
from xq.quantizers.base import Quantized, Quantizer
from xq.quantizers.memo import one_call
from xq.quantizers.wrapper import Wrapper


def robust_schedule(progress: float) -> float:
    """RobustTok's strength of the perturbation, from its progress in training (0 to 1).

    Full in the first fifth, half from three fifths on, in between linear: its epochs 40 and 120
    of 200.

    Args:
        progress: Of the training, 0 to 1.
    """
    return 1 - min(max((progress - 0.2) / 0.4, 0.0), 1.0) / 2


class Perturbed(Wrapper):
    """Replaces some codes by near ones, in training (Qiu et al. 2025, RobustTok, arXiv 2503.08354).

    In a share `beta` of the images each code becomes, with probability `alpha`, one of the `delta`
    nearest to its vector, all of which are equally likely, the nearest included. `z` and `indices`
    are those after the replacement, `losses` and running averages those before. Only in training
    mode with gradients; `encode` never perturbs.

    `alpha` and `delta` weaken as training goes on: they are multiplied by `schedule(progress)`,
    where `progress` is an attribute that the training loop sets, from 0 (start) to 1 (end).

    Differs from the released code in which images are drawn: at random, with their number
    rounded at random, so that its mean is right for small batches too, not the first
    `int(batch * beta)`; and evaluation mode is left alone.

    Args:
        quantizer: A leaf that has `candidates`, such as `VQ`; other wrappers go around this one.
        delta: How many codes to draw from, 1 to `codebook_size`.
        alpha: Probability that a code of a drawn image is replaced.
        beta: Share of images that are drawn.
        schedule: Strength, in [0, 1], as a function of the progress.
        generator: Source of randomness, on the device of the input; torch's own by default. Not
            part of the configuration.

    Raises:
        ValueError: If an argument lies outside its range, or the quantizer offers no near codes.

    Examples:
        >>> quantizer = Perturbed(VQ(8, 1024), delta=100, alpha=0.5, beta=0.1)
        >>> quantizer.progress = 0.25  # of the training
        >>> z, indices, losses = quantizer(torch.randn(16, 8, 8, 8))
    """

    quantizer: Quantizer  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        quantizer: Quantizer,
        delta: int,
        *,
        alpha: float = 1.0,
        beta: float = 0.1,
        schedule: Callable[[float], float] = robust_schedule,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(quantizer)
        name = type(quantizer).__name__
        is_leaf = isinstance(quantizer, Quantizer) and quantizer.code_shape == ()
        if not is_leaf or type(quantizer).candidates is Quantizer.candidates:
            raise ValueError(
                f"Perturbed draws from the candidates of a leaf such as VQ, {name} has none; other "
                "wrappers go around it: ChannelFirst(Perturbed(VQ(...), ...))"
            )
        if not 1 <= delta <= quantizer.codebook_size:
            raise ValueError(
                f"Perturbed needs delta in 1..{quantizer.codebook_size}, the codes of {name}, "
                f"got {delta}"
            )
        if not (0 <= alpha <= 1 and 0 <= beta <= 1):
            raise ValueError(
                f"Perturbed needs alpha and beta in [0, 1], got alpha={alpha} and beta={beta}"
            )
        self.delta, self.alpha, self.beta = delta, alpha, beta
        self.schedule, self.generator = schedule, generator
        # a number on the CPU, for no device and no compiled graph to wait for or depend on
        self._strength = torch.empty((), dtype=torch.float64, device="cpu")
        self.progress = 0.0

    @property
    def progress(self) -> float:
        """How far training is, from 0 to 1."""
        return self._progress

    @progress.setter
    def progress(self, progress: float) -> None:
        self._progress = progress
        self._strength.fill_(self.schedule(progress))

    def enter(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        if x.ndim < 2:
            raise ValueError(
                f"Perturbed draws among the images of a batch, got shape {tuple(x.shape)}"
            )
        return x

    def leave(self, z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return z

    def _quantized(self, u: Tensor, depth: Any, **context: Any) -> Quantized:
        z, indices, losses = super()._quantized(u, depth, **context)
        if not (self.training and torch.is_grad_enabled()):
            return Quantized(z, indices, losses)
        with one_call():
            u = self.quantizer.bound(u)
            images, replaces, rank = self._draw(indices)
            with torch.no_grad():
                near = self.quantizer.candidates(u.detach()[images], self.delta)
                drawn = near.gather(-1, rank[..., None])[..., 0]
                drawn = drawn.where(replaces, indices[images])
            indices = indices.index_copy(0, images, drawn)
            z = self.quantizer.dequantize(indices).to(u.dtype)
            return Quantized(self.quantizer.estimate(u, z), indices, losses)

    def _draw(
        self, indices: Int[Tensor, "b ..."]
    ) -> tuple[Int[Tensor, " drawn"], Bool[Tensor, "drawn ..."], Int[Tensor, "drawn ..."]]:
        """Which images are drawn, which of their codes are replaced, by which of the nearest."""
        options: dict[str, Any] = {"device": indices.device, "generator": self.generator}
        wanted = len(indices) * self.beta
        images = torch.randperm(len(indices), **options)[: math.ceil(wanted)]
        # as many as there can be, so that no shape depends on chance; the last may be in vain
        places = torch.arange(len(images), device=indices.device)
        counts = places < torch.floor(wanted + torch.rand(1, **options))
        shape = (len(images), *indices.shape[1:])
        replaces = torch.rand(shape, **options) < self._strength * self.alpha
        replaces = replaces & counts.view(-1, *[1] * (indices.ndim - 1))
        nearest = (self._strength * self.delta).floor().clamp(min=1)
        rank = (torch.rand(shape, **options, dtype=torch.float64) * nearest).long()
        return images, replaces, rank

    def config(self) -> dict[str, Any]:
        options = {"delta": self.delta, "alpha": self.alpha, "beta": self.beta}
        return {**super().config(), **options, "schedule": describe(self.schedule)}

    def extra_repr(self) -> str:
        return f"delta={self.delta}, alpha={self.alpha}, beta={self.beta}"
