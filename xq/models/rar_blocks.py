"""The blocks of RAR's transformer, modulated by the class and the step."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xq.models.cache import Cache, causal_attention


class RARBlock(nn.Module):
    """Causal attention and a perceptron, each modulated by the condition of its position.

    Args:
        width: Channels of a token.
        heads: Heads of attention.
        hidden: Channels within the perceptron.
        dropout: Rate of dropout.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = nn.LayerNorm(width // heads, eps=1e-6)
        self.key_norm = nn.LayerNorm(width // heads, eps=1e-6)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "b n width"],
        condition: Float[Tensor, "b n width"],
        cache: Cache | None = None,
    ) -> Float[Tensor, "b n width"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        y = self.norm1(x) * (1 + scale1) + shift1
        qkv = self.qkv(y).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.query_norm(q), self.key_norm(k)
        rate = self.dropout.p if self.training else 0.0
        attended = causal_attention(q, k, v, cache, rate)
        x = x + gate1 * self.dropout(self.projection(attended))
        y = self.norm2(x) * (1 + scale2) + shift2
        y = self.contract(self.dropout(F.gelu(self.expand(y))))
        return x + gate2 * self.dropout(y)
