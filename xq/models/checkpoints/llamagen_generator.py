"""LlamaGen's generators (Sun et al. 2024), conditioned on classes or texts.

Shapes do not tell the grid of tokens nor the number of heads. Without `into=` the grid is 16 x 16,
that of the models for 256 x 256 pixels; those for 384 x 384 have 24 x 24 tokens, and the second
stage of texts 32 x 32: `load_checkpoint(path, into=ar_l(tokens=24))`. Heads are those of the
published size of that width.

Its `w1`, `w3` and `w2` are gate, expansion and contraction of SwiGLU.
"""

from typing import Any

from torch import nn

from xq.models.ar import AR
from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import KeyTable, Rename
from xq.models.checkpoints.transformer_layout import Shapes, count

_TITLE = "LlamaGen generator"
_OWN = {"tok_embeddings.weight", "output.weight", "layers.0.attention.wqkv.weight"}
_CLASSES = "cls_embedding.embedding_table.weight"
_TEXT = "cls_embedding.uncond_embedding"
# heads of B, L, XL, XXL, XXXL, and of 1B, 3B, 7B, by their width
_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2560: 40, 2048: 32, 3200: 32, 4096: 32}

_BLOCK = {
    "attention_norm.": "norm1.",
    "attention.wqkv.": "qkv.",
    "attention.wo.": "projection.",
    "ffn_norm.": "norm2.",
    "feed_forward.w1.": "gate.",
    "feed_forward.w3.": "expand.",
    "feed_forward.w2.": "contract.",
}


def _recognise(state: Shapes) -> bool:
    return state.keys() >= _OWN


def _build(state: Shapes) -> nn.Module:
    """The generator of 16 x 16 tokens.

    Raises:
        ValueError: If no published size has that width.
    """
    codes, width = state["tok_embeddings.weight"].shape
    if width not in _HEADS:
        raise ValueError(
            f"{_TITLE} is published in the widths {', '.join(map(str, sorted(_HEADS)))}, got "
            f"{width}, for which the number of heads is unknown: build an AR, and pass it as into="
        )
    sizes: Any = {"width": width, "depth": count(state, "layers."), "heads": _HEADS[width]}
    if _TEXT in state:
        return AR(codes, text=tuple(state[_TEXT].shape), **sizes)
    rows, _ = state[_CLASSES].shape
    return AR(codes, classes=rows - 1, **sizes)


def _table(state: Shapes) -> KeyTable:
    return KeyTable(
        [
            Rename("tok_embeddings.weight", "embedding.weight"),
            Rename(_CLASSES, "condition.table.weight"),
            Rename(_TEXT, "condition.null"),
            Rename("cls_embedding.cap_proj.fc1.weight", "condition.expand.weight"),
            Rename("cls_embedding.cap_proj.fc2.weight", "condition.contract.weight"),
            *(Rename(f"layers.{{i}}.{old}", f"blocks.{{i}}.{new}") for old, new in _BLOCK.items()),
            Rename("norm.weight", "norm.weight"),
            Rename("output.weight", "head.weight"),
        ]
    )


FORMAT = Format("llamagen_generator", _TITLE, _recognise, _build, _table)
