"""LlamaGen's tokenizers VQ-8 and VQ-16 (Sun et al. 2024): `vq_ds16_c2i.pt` and its like."""

from itertools import count
from typing import Any

from torch import nn

from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import Drop, KeyTable, Rename
from xq.models.checkpoints.taming_layout import Shapes
from xq.models.cnn import CNNDecoder, CNNEncoder
from xq.models.tokenizer import Tokenizer
from xq.quantizers import VQ


def _recognise(state: Shapes) -> bool:
    names = {"encoder.conv_blocks.0.res.0.conv1.weight", "quantize.embedding.weight"}
    # XQ-GAN's CNN has the same names, but for its counts of uses
    return names <= state.keys() and "quantize.ema_vocab_hit_SV" not in state


def _build(state: Shapes) -> nn.Module:
    """The tokenizer with codes of unit length, as the released files have them."""
    codebook_size, dim = state["quantize.embedding.weight"].shape
    sizes = cnn_sizes(state)
    return Tokenizer(
        CNNEncoder(dim, **sizes), VQ(dim, codebook_size, normalize=True), CNNDecoder(dim, **sizes)
    )


def _table(state: Shapes) -> KeyTable:
    return KeyTable(
        [
            Rename("quant_conv.", "encoder.quant_conv."),
            Rename("post_quant_conv.", "decoder.post_quant_conv."),
            Rename("encoder.", "encoder."),
            Rename("decoder.", "decoder."),
            Rename("quantize.embedding.weight", "quantizer.codebook.weight"),
            # its last 65536 indices
            Drop("quantize.codebook_used"),
        ]
    )


def cnn_sizes(state: Shapes) -> dict[str, Any]:
    """The arguments of `CNNEncoder` and `CNNDecoder`, from the shapes of the encoder."""
    level, block = "encoder.conv_blocks.{}.res.0.conv1.weight", "encoder.conv_blocks.0.res.{}.conv1"
    channels, image_channels, *_ = state["encoder.conv_in.weight"].shape
    levels = next(i for i in count() if level.format(i) not in state)
    return {
        "channels": channels,
        "multipliers": [state[level.format(i)].shape[0] // channels for i in range(levels)],
        "blocks": next(i for i in count() if f"{block.format(i)}.weight" not in state),
        "z_channels": state["quant_conv.weight"].shape[1],
        "image_channels": image_channels,
    }


FORMAT = Format("llamagen", "LlamaGen VQ", _recognise, _build, _table)
