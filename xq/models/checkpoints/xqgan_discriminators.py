"""The discriminators beside XQ-GAN's tokenizers (Li et al. 2024), which are LlamaGen's too."""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from torch import Tensor, nn

from xq.losses import PatchGAN, StyleGANDiscriminator
from xq.models.checkpoints.format import Format
from xq.models.checkpoints.key_table import Drop, KeyTable, Rename

Shapes = Mapping[str, Tensor]


def _build_patchgan(state: Shapes) -> nn.Module:
    channels, image_channels = state["main.0.weight"].shape[:2]
    # convolutions that halve, one that does not, and the logits
    depth = sum(tensor.ndim == 4 for tensor in state.values()) - 2
    return PatchGAN(image_channels, channels=channels, depth=depth, norm=_norm(state))


def _norm(state: Shapes) -> str:
    return "batch" if "main.3.running_mean" in state else "group"


def _build_stylegan(state: Shapes) -> nn.Module:
    blocks = next(i for i in count() if f"blocks.{i + 2}.conv_res.weight" not in state)
    image_channels = state["blocks.0.weight"].shape[1]
    return StyleGANDiscriminator(4 << blocks, image_channels=image_channels)


def _build_dino(state: Shapes) -> nn.Module:
    raise ValueError(
        "XQ-GAN's files hold no vision transformer for the discriminator: give one, as in "
        "into=DINODiscriminator(), which downloads it, or with weights= for a local file"
    )


def _as_they_are(*parts: str, left_out: Sequence[str] = ()) -> Any:
    rules = [*map(Drop, left_out), *(Rename(part, part) for part in parts)]
    return lambda state: KeyTable(rules)


def _has(name: str) -> Any:
    return lambda state: name in state


FORMATS = (
    Format(
        "xqgan_dino",
        "XQ-GAN's DINO discriminator",
        _has("heads.0.0.0.weight_orig"),
        _build_dino,
        _as_they_are("heads."),
    ),
    Format(
        "xqgan_patchgan",
        "PatchGAN discriminator",
        _has("main.11.weight"),
        _build_patchgan,
        _as_they_are("main."),
    ),
    Format(
        "xqgan_stylegan",
        "StyleGAN discriminator",
        _has("blocks.2.downsample.1.weight"),
        _build_stylegan,
        _as_they_are(
            *("blocks.", "final_conv.", "final_linear."),
            left_out=["blocks.{i}.downsample.0.f"],
        ),
    ),
)
