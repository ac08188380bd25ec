"""Masked: padded sequences, of which the valid tokens alone count."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from xq.quantizers.base import Quantized, Quantizer
from xq.quantizers.layout import ChannelFirst
from xq.quantizers.perturb import Perturbed
from xq.quantizers.wrapper import Wrapper


class Masked(Wrapper):
    """Quantizes the valid tokens of padded batches; `forward` and `encode` need `mask=`.

    Packs the valid tokens, hands them to the quantizer as one batch `(valid, dim)`, and puts the
    results in their places: padding gets index -1 and a `z` of zeros, and `decode` takes it so. All
    is as if the valid tokens alone had been quantized: losses, running averages, entropies. A batch
    without a valid token is an empty one, with zero losses; the quantizer is called nonetheless, so
    that processes wait for each other in vain nowhere.

    How many tokens are valid is a value on the device, so this is the one part that waits for it
    and whose shapes depend on it; `torch.compile(fullgraph=True)` refuses it. `depth` with one
    entry a sample holds for its tokens, and losses stay means over tokens.

    Around it goes `ChannelFirst`, for `(b, dim, n)` and a mask `(b, n)`; into it `Projected`.

    Args:
        quantizer: A quantizer without scales, or such in a `Projected`.

    Raises:
        ValueError: If the quantizer has scales, which take whole grids, or is a wrapper that has to
            see samples.

    Examples:
        >>> quantizer, mask = Masked(VQ(8, 64)), torch.tensor([[True, True, False]])
        >>> z, indices, losses = quantizer(torch.randn(1, 3, 8), mask=mask)
        >>> indices[0, 2].item(), z[0, 2].any().item()
        (-1, False)
    """

    def __init__(self, quantizer: "Quantizer | Wrapper") -> None:
        super().__init__(quantizer)
        if self.scales:
            raise ValueError(
                f"Masked packs single tokens, {type(quantizer).__name__} with scales {self.scales} "
                "takes whole grids"
            )
        for part in quantizer.modules():
            if isinstance(part, ChannelFirst):
                raise ValueError(
                    "Masked packs channel-last tokens: write ChannelFirst(Masked(...))"
                )
            if isinstance(part, Masked | Perturbed):
                raise ValueError(
                    f"Masked hands over tokens without their samples, which {type(part).__name__} "
                    "has to see"
                )

    def enter(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        if x.ndim < 2 or x.shape[-1] != self.dim:
            raise ValueError(
                f"Masked expects tokens (*batch, {self.dim}), got shape {tuple(x.shape)}; "
                "ChannelFirst(Masked(...)) takes channel-first input"
            )
        return x

    def leave(self, z: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        return z

    def _quantized(self, u: Tensor, depth: Any, *, mask: Any = None, **context: Any) -> Quantized:
        valid = _valid(u, mask)
        packed = u.flatten(0, -2).index_select(0, valid)
        if isinstance(depth, Tensor):
            depth = _of_tokens(depth, u).index_select(0, valid)
        z, indices, losses = super()._quantized(packed, depth, **context)
        tokens = u.shape[:-1]
        z, indices = _scattered(z, valid, tokens, 0), _scattered(indices, valid, tokens, -1)
        return Quantized(z, indices, losses)

    def _encoded(
        self, encode: Callable[..., Tensor], u: Tensor, *, mask: Any = None, **context: Any
    ) -> Tensor:
        valid = _valid(u, mask)
        indices = encode(u.flatten(0, -2).index_select(0, valid), **context)
        return _scattered(indices, valid, u.shape[:-1], -1)

    def _opened(self, indices: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        code_axes = len(self.code_shape)
        if indices.ndim < code_axes:
            return super()._opened(indices)
        tokens = indices.shape[: indices.ndim - code_axes]
        flat = indices.reshape(tokens.numel(), -1)
        # a uint8 of 255 would compare equal to -1
        valid = (flat.long() != -1).any(-1).nonzero()[:, 0]
        packed = flat.index_select(0, valid).view(len(valid), *indices.shape[len(tokens) :])
        return packed, lambda z: _scattered(z, valid, tokens, 0)


def _valid(u: Float[Tensor, "*tokens dim"], mask: Any) -> Int[Tensor, " valid"]:
    """Places of the valid tokens, all tokens being on one axis."""
    tokens = tuple(u.shape[:-1])
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != tokens:
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(
            f"Masked needs mask=, a bool tensor of shape {tokens} that is True for valid tokens, "
            f"got {got}"
        )
    return mask.flatten().nonzero()[:, 0].to(u.device)


def _of_tokens(depth: Tensor, u: Float[Tensor, "*tokens dim"]) -> Shaped[Tensor, " tokens"]:
    """The depth of each token, of one a sample."""
    if depth.shape != u.shape[:1]:
        raise ValueError(
            f"Masked expects depth as one integer a sample, shape ({len(u)},), "
            f"got shape {tuple(depth.shape)}"
        )
    tokens = u.shape[:-1]
    return depth.view(-1, *[1] * (len(tokens) - 1)).expand(tokens).flatten()


def _scattered(
    packed: Shaped[Tensor, "valid ..."], valid: Tensor, tokens: Any, padding: int
) -> Shaped[Tensor, "..."]:
    """The packed rows in their places, the others filled."""
    full = packed.new_full((tokens.numel(), *packed.shape[1:]), padding)
    return full.index_copy(0, valid, packed).view(*tokens, *packed.shape[1:])
