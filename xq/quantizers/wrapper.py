"""Wrappers change what goes into a whole tree and what comes out; they stand at its root."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from xq.config import describe
from xq.precision import Float32, float32_island, widen
from xq.pretrained import Pretrained
from xq.quantizers.base import Quantized, Quantizer, Scales, ScalesLike
from xq.quantizers.sharing import sharing


class Wrapper(Float32, Pretrained, ABC):
    """Hands a tree of quantizers another form of its input.

    A wrapper writes `enter` and `leave`. Wrappers stack, outermost first, and are refused inside
    composites. Attributes other than `dim` are those of the tree.

    Args:
        quantizer: A quantizer, or another wrapper.

    Raises:
        TypeError: If it is neither.
    """

    def __init__(self, quantizer: "Quantizer | Wrapper") -> None:
        super().__init__()
        if not isinstance(quantizer, Quantizer | Wrapper):
            raise TypeError(
                f"{type(self).__name__} wraps a quantizer, got {type(quantizer).__name__}"
            )
        self.quantizer = quantizer

    @abstractmethod
    def enter(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What the quantizer sees of `x`; raises a `ValueError` if it does not fit."""

    @abstractmethod
    def leave(self, z: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """What the caller sees of the quantizer's `z`."""

    @property
    def dim(self) -> int:
        """Channels of the input and of `z`."""
        return self._inner.dim

    @final
    def forward(self, x: Shaped[Tensor, "..."], depth: Any = None, **context: Any) -> Quantized:
        """As `Quantizer.forward`, of the wrapper's own form of input.

        Args:
            x: The vectors.
            depth: See `Quantizer.forward`.
            **context: What a wrapper further in asks for, such as the `mask` of `Masked`.
        """
        with float32_island(x.device.type):
            z, indices, losses = self._quantized(self._entered(x), depth, **context)
            z = self.leave(z)
        return Quantized(z.to(x.dtype), indices, losses)

    @final
    @torch.no_grad()
    def encode(self, x: Shaped[Tensor, "..."], **context: Any) -> Int[Tensor, "..."]:
        """As `Quantizer.encode`."""
        with float32_island(x.device.type):
            return self._encoded(self._inner.encode, self._entered(x), **context)

    @final
    def decode(self, indices: Shaped[Tensor, "..."]) -> Float[Tensor, "..."]:
        """As `Quantizer.decode`."""
        with float32_island(indices.device.type):
            packed, unpacked = self._opened(indices)
            return self.leave(unpacked(self._inner.decode(packed)))

    @final
    def partials(self, indices: Shaped[Tensor, "..."]) -> Iterator[Float[Tensor, "..."]]:
        """As `Quantizer.partials`."""
        packed, unpacked = self._opened(indices)
        return self._left(self._inner.partials(packed), unpacked)

    def _left(
        self, partials: Iterator[Tensor], unpacked: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        for z in partials:
            with float32_island(z.device.type):
                z = self.leave(unpacked(z))
            yield z

    def _quantized(self, u: Tensor, depth: Any, **context: Any) -> Quantized:
        """Hands what has entered to the quantizer."""
        return self._inner(u, depth, **context)

    def _encoded(self, encode: Callable[..., Tensor], u: Tensor, **context: Any) -> Tensor:
        """Hands what has entered to `encode` of the quantizer, or to another such function."""
        return encode(u, **context)

    def _opened(self, indices: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What the quantizer can decode of `indices`, and the way back for what it makes of it."""
        return indices, _as_it_is

    def with_scales(self, scales: ScalesLike) -> "Wrapper":
        """The same modules, shared, around the quantizer at another resolution."""
        return sharing(self, quantizer=self.quantizer.with_scales(scales))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON."""
        return {"quantizer": describe(self.quantizer)}

    @property
    def codebook_size(self) -> int:
        """How many values each index can take."""
        return self._inner.codebook_size

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Shape of one token's indices."""
        return self._inner.code_shape

    @property
    def scales(self) -> Scales:
        """Token grids, coarse to fine."""
        return self._inner.scales

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """`scales` as `(h, w)` pairs."""
        return self._inner.grids

    @property
    def num_tokens(self) -> int:
        """Tokens an image of a quantizer with `scales`."""
        return self._inner.num_tokens

    @property
    def bits(self) -> float:
        """Bits a token."""
        return self._inner.bits

    @property
    def depth(self) -> int:
        """Steps of the outermost residual."""
        return self._inner.depth

    @property
    def _inner(self) -> Any:
        # a quantizer or a wrapper, which offer the same
        return self.quantizer

    def _entered(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} expects floating-point vectors, got {x.dtype}; "
                "indices go to decode(), images to float first"
            )
        return self.enter(widen(x))


def _as_it_is(z: Tensor) -> Tensor:
    return z
