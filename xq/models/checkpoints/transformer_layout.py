"""Transformers in the names of CLIP, which bsq-vit and TiTok keep: rules, and sizes from shapes."""

import math
import re
from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

from xq.models.checkpoints.key_table import Rename

Shapes: TypeAlias = Mapping[str, Tensor]

# no shape tells it; all their configurations have as many
CHANNELS_A_HEAD = 64

_BLOCK = {
    "ln_1.": "norm1.",
    "attn.in_proj_weight": "qkv.weight",
    "attn.in_proj_bias": "qkv.bias",
    "attn.out_proj.": "projection.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "expand.",
    "mlp.c_proj.": "contract.",
}


def transformer_rules(part: str, blocks: str) -> list[Rename]:
    """The rules of an encoder or decoder.

    Args:
        part: Its prefix, the same on both sides, such as "encoder.".
        blocks: The prefix of their blocks within it, such as "transformer.resblocks.".
    """
    ours = f"{part}transformer."
    return [
        Rename(f"{part}ln_pre.", f"{ours}norm_in."),
        Rename(f"{part}ln_post.", f"{ours}norm_out."),
        *(
            Rename(f"{part}{blocks}{{i}}.{old}", f"{ours}blocks.{{i}}.{new}")
            for old, new in _BLOCK.items()
        ),
    ]


def count(state: Shapes, prefix: str) -> int:
    """How many modules a list has whose names are `prefix` and a number."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for key in state if (match := pattern.match(key))})


def side(numbers: int, what: str, title: str) -> int:
    """The side of a square.

    Raises:
        ValueError: If it is none, so that height and width are unknown.
    """
    root = math.isqrt(numbers)
    if root * root != numbers:
        raise ValueError(
            f"{title} has {numbers} {what}, which are no square, so that height and width are "
            "unknown: build the module with them, and pass it as into="
        )
    return root


def transformer_sizes(state: Shapes, width: int, blocks: str, title: str) -> dict[str, int]:
    """Width, depth and heads.

    Raises:
        ValueError: If there are no blocks, or the width is not that of whole heads.
    """
    depth = count(state, blocks)
    if not depth or width % CHANNELS_A_HEAD:
        raise ValueError(
            f"{title} has {depth} blocks of width {width}; at least one was expected, with "
            f"{CHANNELS_A_HEAD} channels a head"
        )
    return {"width": width, "depth": depth, "heads": width // CHANNELS_A_HEAD}
