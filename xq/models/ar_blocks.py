"""The blocks of LlamaGen's transformer, and its rotary positions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xq.models.cache import Cache, causal_attention
from xq.precision import widen

_MULTIPLE = 256


class ARBlock(nn.Module):
    """Causal attention with rotary positions, then SwiGLU, each behind an RMS norm.

    LLaMA (Touvron et al. 2023, section 2.2), as LlamaGen takes it over.

    Args:
        width: Channels of a token.
        heads: Heads of attention.
        dropout: Rate after the attention and after SwiGLU.
        drop_path: Rate at which a sample skips either of them.
    """

    def __init__(self, width: int, heads: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        hidden = -(-int(8 * width / 3) // _MULTIPLE) * _MULTIPLE
        self.norm1 = nn.RMSNorm(width, eps=1e-5)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.projection = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width, eps=1e-5)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.expand = nn.Linear(width, hidden, bias=False)
        self.contract = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b n width"],
        turns: Float[Tensor, "2 n c"],
        cache: Cache | None = None,
    ) -> Float[Tensor, "b n width"]:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        # queries and keys turn together
        turned = rotated(qkv[:, :, :2], turns)
        q, k, v = (part.transpose(1, 2) for part in (*turned.unbind(2), qkv[:, :, 2]))
        x = x + self._skipping(self.dropout(self.projection(causal_attention(q, k, v, cache))))
        y = self.norm2(x)
        y = self.contract(F.silu(self.gate(y)) * self.expand(y))
        return x + self._skipping(self.dropout(y))

    def _skipping(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1 - self.drop_path)


def rotations(axes: Sequence[Float[Tensor, " n"]], channels: int) -> Float[Tensor, "2 n c"]:
    """What `rotated` multiplies by, from places along each axis.

    Each axis has an equal share of the pairs of channels, whose angles are a place times the powers
    of 10000 from 1 downwards (Su et al. 2021, RoFormer).

    Args:
        axes: Places, such as rows and columns.
        channels: Of a head.
    """
    pairs = channels // 2 // len(axes)
    powers = torch.arange(pairs, dtype=axes[0].dtype, device=axes[0].device) / pairs
    angles = torch.cat([axis[:, None] * 10000.0**-powers for axis in axes], dim=1)
    cos, sin = angles.cos(), angles.sin()
    # of a pair the first channel and the second
    both = torch.stack([torch.stack([cos, cos], dim=-1), torch.stack([-sin, sin], dim=-1)])
    return both.flatten(-2)


def rotated(
    x: Float[Tensor, "b n parts heads c"], turns: Float[Tensor, "2 n c"]
) -> Float[Tensor, "b n parts heads c"]:
    """Turns each pair of neighbouring channels by its angle, in float32."""
    cos, sin = turns[:, :, None, None]
    wide = widen(x)
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (wide * cos + swapped * sin).to(x.dtype)
