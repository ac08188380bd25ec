"""RAR (Yu et al. 2024), and the generators of RobustTok, which have its layout.

Shapes tell all but that the grid of tokens is a square, and the rates of dropout.
"""

from torch import nn

from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import KeyTable, Rename
from xq.models.checkpoints.transformer_layout import Shapes, count, side
from xq.models.rar import RAR, SPARE_POSITIONS

_TITLE = "RAR generator"
_OWN = {"target_aware_pos_embed", "timesteps_embeddings", "lm_head.weight"}

_BLOCK = {
    "norm1.": "norm1.",
    "attn.qkv.": "qkv.",
    "attn.q_norm.": "query_norm.",
    "attn.k_norm.": "key_norm.",
    "attn.proj.": "projection.",
    "norm2.": "norm2.",
    "mlp.fc1.": "expand.",
    "mlp.fc2.": "contract.",
    "adaLN_modulation.1.": "modulation.",
}


def _recognise(state: Shapes) -> bool:
    return state.keys() >= _OWN


def _build(state: Shapes) -> nn.Module:
    """The generator.

    Raises:
        ValueError: If its tokens are no square grid.
    """
    codes, width = state["lm_head.weight"].shape
    rows, _ = state["embeddings.weight"].shape
    (channels,) = state["blocks.0.attn.q_norm.weight"].shape
    hidden, _ = state["blocks.0.mlp.fc1.weight"].shape
    _, places, _ = state["pos_embed"].shape
    return RAR(
        codes,
        side(places - SPARE_POSITIONS, "tokens", _TITLE),
        # a mask and "no class" are in the vocabulary too
        classes=rows - codes - 2,
        width=width,
        depth=count(state, "blocks."),
        heads=width // channels,
        hidden=hidden,
    )


def _table(state: Shapes) -> KeyTable:
    return KeyTable(
        [
            Rename("cls_token", "class_token"),
            Rename("pos_embed", "positions"),
            Rename("target_aware_pos_embed", "next_positions"),
            Rename("timesteps_embeddings", "steps"),
            Rename("embeddings.weight", "embedding.weight"),
            *(Rename(f"blocks.{{i}}.{old}", f"blocks.{{i}}.{new}") for old, new in _BLOCK.items()),
            Rename("adaln_before_head.adaLN_modulation.1.", "modulation."),
            Rename("lm_head.", "head."),
        ]
    )


FORMAT = Format("rar", _TITLE, _recognise, _build, _table)
