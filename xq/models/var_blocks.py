"""The blocks of VAR's transformer, whose norms and gates a condition makes."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from xq.models.cache import Cache


class BlockCache(Cache):
    """What sampling keeps of a block: keys, values, and what the condition makes.

    Args:
        length: How many positions there will be.
    """

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.parts: Tensor | None = None


class Attention(nn.Module):
    """Attention by angles: queries and keys of length 1, and a learned sharpness for each head."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        # a bias of the keys would add the same to all scores of a query
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(4)))
        self.projection = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "b n width"], visible: Tensor | None, cache: Cache | None
    ) -> Float[Tensor, "b n width"]:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))
        q, k = F.normalize(qkv[:, :, :2], dim=-1).unbind(2)
        sharpness = self.log_scale.clamp(max=math.log(100)).exp()[:, None]
        # norms are float32 in autocast
        parts = ((q * sharpness).to(qkv.dtype), k.to(qkv.dtype), qkv[:, :, 2])
        q, k, v = (part.transpose(1, 2) for part in parts)
        if cache is not None:
            k, v = cache.extend(k, v)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=1.0)
        return self.projection(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a perceptron, whose norms and gates the class makes."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm = plain_norm(width)
        self.attention = Attention(width, heads)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self,
        x: Float[Tensor, "b n width"],
        condition: Float[Tensor, "b width"],
        visible: Bool[Tensor, "n n"] | None = None,
        cache: BlockCache | None = None,
    ) -> Float[Tensor, "b n width"]:
        parts = self._parts(condition, cache).chunk(6, dim=-1)
        gate1, gate2, scale1, scale2, shift1, shift2 = parts
        attended = self.attention(modulated(self.norm(x), scale1, shift1), visible, cache)
        x = x + self._dropped(attended * gate1)
        hidden = self.expand(modulated(self.norm(x), scale2, shift2))
        return x + self._dropped(self.contract(F.gelu(hidden, approximate="tanh")) * gate2)

    def _parts(self, condition: Tensor, cache: BlockCache | None) -> Float[Tensor, "b 1 parts"]:
        """Gates, scales and shifts; in sampling they are the same at all scales."""
        if cache is not None and cache.parts is not None:
            return cache.parts
        parts = self.modulation(condition)[:, None]
        if cache is not None:
            cache.parts = parts
        return parts

    def _dropped(self, x: Tensor) -> Tensor:
        """Stochastic depth (Huang et al. 2016), an image at a time."""
        if not self.training or not self.drop_path:
            return x
        keep = 1 - self.drop_path
        kept = torch.rand(len(x), 1, 1, device=x.device) < keep
        return x * (kept / keep).to(x.dtype)


def plain_norm(width: int) -> nn.LayerNorm:
    """A norm whose scale and shift come from the condition."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What a condition makes of normalized features."""
    return x * (1 + scale) + shift
