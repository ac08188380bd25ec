"""BSQ-ViT (Zhao et al. 2024), the image tokenizers of bsq-vit.

Shapes do not tell what all of its released configurations have: square images and patches, 64
channels a head, codes on the unit sphere (`l2_norm` and `post_q_l2_norm`), temperature 1.

Its channel 0 is the highest bit of a token, ours the lowest. So the channels next to the quantizer
are reversed, which makes tokens equal to the original's. Groups of bits (`group_size`) are the same
ones, the last first.
"""

from typing import Any

from torch import Tensor, nn

from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import Drop, KeyTable, Rename
from xq.models.checkpoints.transformer_layout import (
    Shapes,
    side,
    transformer_rules,
    transformer_sizes,
)
from xq.models.plain_vit import PatchDecoder, PatchEncoder
from xq.models.tokenizer import Tokenizer
from xq.quantizers import BSQ

_TITLE = "BSQ-ViT"
_BLOCKS = "transformer.resblocks."
_COLOURS = 3


def _recognise(state: Shapes) -> bool:
    return {"quantize.group_basis", "quant_embed.weight", "post_quant_embed.weight"} <= state.keys()


def _build(state: Shapes) -> nn.Module:
    """The tokenizer; entropies are those of groups as large as the file's.

    Raises:
        ValueError: If patches are no squares, or it predicts more than pixels.
    """
    dim, _ = state["quant_embed.weight"].shape
    (group_size,) = state["quantize.group_basis"].shape
    _, seen = state["encoder.conv1.weight"].shape
    made, _ = state["decoder.conv_out.weight"].shape
    if made != seen:
        raise ValueError(
            f"{_TITLE} sees {seen} numbers a patch and predicts {made}; those that predict a "
            "logit-Laplace distribution of pixels are not supported"
        )
    encoder = PatchEncoder(dim, **_sizes(state, "encoder.", seen))
    decoder = PatchDecoder(dim, **_sizes(state, "decoder.", made))
    return Tokenizer(encoder, BSQ(dim, group_size=group_size), decoder)


def _table(state: Shapes) -> KeyTable:
    return KeyTable(
        [
            *transformer_rules("encoder.", _BLOCKS),
            *transformer_rules("decoder.", _BLOCKS),
            Rename("encoder.positional_embedding", "encoder.positions"),
            Rename("encoder.conv1.weight", "encoder.patches.weight"),
            Rename("quant_embed.weight", "encoder.to_tokens.weight", _rows, _rows),
            Rename("quant_embed.bias", "encoder.to_tokens.bias", _rows, _rows),
            Rename("post_quant_embed.weight", "decoder.from_tokens.weight", _columns, _columns),
            Rename("post_quant_embed.bias", "decoder.from_tokens.bias"),
            Rename("decoder.positional_embedding", "decoder.positions"),
            Rename("decoder.ffn.0.", "decoder.feedforward.0."),
            Rename("decoder.conv_out.", "decoder.pixels."),
            # the values of bits, and those within a group
            Drop("quantize.basis"),
            Drop("quantize.group_basis"),
        ]
    )


def _sizes(state: Shapes, part: str, numbers: int) -> dict[str, Any]:
    patches, width = state[f"{part}positional_embedding"].shape
    patch_size = side(numbers // _COLOURS, "pixels a patch", _TITLE)
    return {
        "image_size": patch_size * side(patches, "patches", _TITLE),
        "patch_size": patch_size,
        **transformer_sizes(state, width, f"{part}{_BLOCKS}", _TITLE),
    }


def _rows(tensor: Tensor) -> Tensor:
    return tensor.flip(0)


def _columns(tensor: Tensor) -> Tensor:
    return tensor.flip(1)


FORMAT = Format("bsq_vit", "BSQ-ViT image tokenizer", _recognise, _build, _table)
