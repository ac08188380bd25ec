"""Open-MAGVIT2's tokenizers for images (Luo et al. 2024), with LFQ."""

from torch import Tensor, nn

from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import Drop, KeyTable, Rename, Rule
from xq.models.checkpoints.taming_layout import Shapes, level_count, outer_rules, sizes
from xq.models.magvit2 import MAGVIT2Decoder, MAGVIT2Encoder
from xq.models.tokenizer import Tokenizer
from xq.quantizers import LFQ


def _recognise(state: Shapes) -> bool:
    return {"encoder.mid_block.0.conv1.weight", "decoder.adaptive.0.gamma.weight"} <= state.keys()


def _build(state: Shapes) -> nn.Module:
    """The tokenizer; its quantizer has nothing to learn."""
    dim, arguments = state["encoder.conv_out.weight"].shape[0], sizes(state)
    return Tokenizer(MAGVIT2Encoder(dim, **arguments), LFQ(dim), MAGVIT2Decoder(dim, **arguments))


def _table(state: Shapes) -> KeyTable:
    rules: list[Rule] = []
    levels = level_count(state)
    for i in range(levels):
        old, new = f"encoder.down.{i}.", f"encoder.conv_blocks.{i}."
        rules += [
            Rename(f"{old}block.", f"{new}res."),
            Rename(f"{old}downsample.", f"{new}downsample."),
        ]
        # the first of the decoder's levels has the highest resolution, and is the last to run
        old, new = f"decoder.up.{i}.", f"decoder.conv_blocks.{levels - 1 - i}."
        rules += [
            Rename(f"{old}block.", f"{new}res."),
            Rename(f"decoder.adaptive.{i}.", f"{new}adaptive."),
            *(
                Rename(f"{old}upsample.conv1.{p}", f"{new}upsample.conv.{p}", _pixels, _depths)
                for p in ("weight", "bias")
            ),
        ]
    for half in ("encoder.", "decoder."):
        rules += [*outer_rules(half), Rename(f"{half}mid_block.", f"{half}mid.")]
    return KeyTable([*rules, Drop("loss.")])


def _pixels(weight: Tensor) -> Tensor:
    """From channels that vary fastest within a pixel to pixels that do within a channel."""
    return weight.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)


def _depths(weight: Tensor) -> Tensor:
    return weight.unflatten(0, (-1, 4)).transpose(0, 1).flatten(0, 1)


FORMAT = Format("open_magvit2", "Open-MAGVIT2 with LFQ", _recognise, _build, _table)
