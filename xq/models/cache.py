"""Attention that keeps keys and values while a generator samples."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class Cache:
    """Keys and values of one block's attention, with room for all positions from the start.

    Args:
        length: How many positions there will be.
    """

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self._room: Tensor | None = None

    def extend(
        self, k: Float[Tensor, "b heads n c"], v: Float[Tensor, "b heads n c"]
    ) -> tuple[Float[Tensor, "b heads m c"], Float[Tensor, "b heads m c"]]:
        """All keys and values so far, these included; views of the room, nothing is copied."""
        if self._room is None:
            # only now the dtype is known, which is autocast's where that is on
            b, heads, _, channels = k.shape
            self._room = k.new_empty(2, b, heads, self.length, channels)
        start, self.filled = self.filled, self.filled + k.shape[2]
        self._room[0, :, :, start : self.filled] = k
        self._room[1, :, :, start : self.filled] = v
        keys, values = self._room[:, :, :, : self.filled]
        return keys, values


def causal_attention(
    q: Float[Tensor, "b heads n c"],
    k: Float[Tensor, "b heads n c"],
    v: Float[Tensor, "b heads n c"],
    cache: Cache | None,
    dropout: float = 0.0,
) -> Float[Tensor, "b n width"]:
    """Attention to what came before, heads side by side; with a cache, to what is in it too."""
    if cache is not None:
        k, v = cache.extend(k, v)
    # several queries only where the cache was empty, so that the mask is a square
    assert q.shape[2] in (1, k.shape[2])
    causal = q.shape[2] > 1
    x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
    return x.transpose(1, 2).flatten(2)
