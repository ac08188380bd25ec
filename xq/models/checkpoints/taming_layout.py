"""What descends from taming-transformers: the sizes of its CNN, and the names in it."""

from collections.abc import Mapping
from itertools import count
from typing import Any

from torch import Tensor, nn

from xq.models.checkpoints.key_table import Rename, Rule, Split
from xq.models.cnn import CNNDecoder, CNNEncoder

Shapes = Mapping[str, Tensor]


def is_taming(state: Shapes) -> bool:
    """Whether there is such a CNN, with attention in three parts."""
    return {"encoder.mid.attn_1.q.weight", "decoder.up.0.block.0.conv1.weight"} <= state.keys()


def level_count(state: Shapes) -> int:
    """How many resolutions the encoder has."""
    return _counted(state, "encoder.down.{}.block.0.conv1.weight")


def block_count(state: Shapes) -> int:
    """How many residual blocks the encoder has at each resolution."""
    return _counted(state, "encoder.down.0.block.{}.conv1.weight")


def sizes(state: Shapes) -> dict[str, Any]:
    """What the widths tell: the arguments that any encoder of this family takes."""
    channels, image_channels, *_ = state["encoder.conv_in.weight"].shape
    widths = [
        state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(level_count(state))
    ]
    return {
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "blocks": block_count(state),
        "image_channels": image_channels,
    }


def cnn(state: Shapes) -> tuple[nn.Module, nn.Module]:
    """The encoder and decoder that fit."""
    dim, z_channels, kernel, _ = state["quant_conv.weight"].shape
    arguments = {**sizes(state), "z_channels": z_channels, "quant_kernel": kernel}
    return CNNEncoder(dim, **arguments), CNNDecoder(dim, **arguments)


def cnn_rules(state: Shapes) -> list[Rule]:
    """The names of encoder and decoder, with attention in three parts or fused."""
    fused, levels = "encoder.mid.attn_1.qkv.weight" in state, level_count(state)
    rules: list[Rule] = []
    for i in range(levels):
        rules += _level(f"encoder.down.{i}.", f"encoder.conv_blocks.{i}.", fused)
        # the first of the decoder's levels has the highest resolution, and is the last to run
        rules += _level(f"decoder.up.{i}.", f"decoder.conv_blocks.{levels - 1 - i}.", fused)
    for half in ("encoder.", "decoder."):
        rules += _attention(f"{half}mid.attn_1.", f"{half}mid.1.", fused)
        rules += [
            Rename(f"{half}mid.block_1.", f"{half}mid.0."),
            Rename(f"{half}mid.block_2.", f"{half}mid.2."),
        ]
        rules += outer_rules(half)
    return [
        *rules,
        Rename("quant_conv.", "encoder.quant_conv."),
        Rename("post_quant_conv.", "decoder.post_quant_conv."),
    ]


def outer_rules(half: str) -> list[Rule]:
    """The layers at both ends of an encoder or decoder, whose names are the same."""
    return [
        Rename(f"{half}{name}.", f"{half}{name}.") for name in ("conv_in", "norm_out", "conv_out")
    ]


def _level(old: str, new: str, fused: bool) -> list[Rule]:
    return [
        Rename(f"{old}block.{{j}}.", f"{new}res.{{j}}."),
        *_attention(f"{old}attn.{{j}}.", f"{new}attn.{{j}}.", fused),
        Rename(f"{old}downsample.", f"{new}downsample."),
        Rename(f"{old}upsample.", f"{new}upsample."),
    ]


def _attention(old: str, new: str, fused: bool) -> list[Rule]:
    parts = ("weight", "bias") if fused else ()
    splits = [Split(f"{old}qkv.{p}", tuple(f"{new}{name}.{p}" for name in "qkv")) for p in parts]
    return [*splits, Rename(old, new)]


def _counted(state: Shapes, name: str) -> int:
    return next(i for i in count() if name.format(i) not in state)
