"""The plain pre-norm transformer of ViT-VQGAN, BSQ-ViT and TiTok."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xq.models.cnn_blocks import check_sizes


def check_heads(owner: nn.Module, width: int, heads: int) -> None:
    """Refuses heads that do not share the channels evenly.

    Raises:
        ValueError: If they do not.
    """
    if width % heads:
        raise ValueError(
            f"{type(owner).__name__} needs `heads` to divide the width {width}, got {heads}; "
            "64 channels a head are usual"
        )


def init_linear_(module: nn.Module, std: float = 0.02) -> None:
    """Starts linear maps as ViTs do: normal weights, biases of zero; in place."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class TransformerBlock(nn.Module):
    """Attention of all tokens to all, then a perceptron, each behind a norm and around a shortcut.

    The encoder block of ViT (Dosovitskiy et al. 2021, section 3.1), with four times the width
    within the perceptron and the exact GELU.

    Args:
        width: Channels of a token.
        heads: Heads of attention; they share the channels evenly.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b n width"]) -> Float[Tensor, "b n width"]:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class Transformer(nn.Module):
    """Blocks between two normalizations; the first is that of CLIP, BSQ-ViT and TiTok.

    Args:
        width: Channels of a token.
        depth: Blocks.
        heads: Heads of attention.
        checkpointing: Whether a training step recomputes blocks rather than keep what is in them.

    Raises:
        ValueError: If a size is not a positive integer or `heads` does not divide `width`.
    """

    def __init__(self, width: int, depth: int, heads: int, *, checkpointing: bool = False) -> None:
        super().__init__()
        check_sizes(self, width=width, depth=depth, heads=heads)
        check_heads(self, width, heads)
        self.checkpointing = checkpointing
        self.norm_in = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)
        init_linear_(self)

    def forward(
        self, x: Float[Tensor, "b n width"], start: int = 0, count: int | None = None
    ) -> Float[Tensor, "b m width"]:
        """The last features of `count` tokens from `start` on, by default of all."""
        x = self.norm_in(x)
        recompute = self.checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        count = x.shape[1] - start if count is None else count
        return self.norm_out(x.narrow(1, start, count))
