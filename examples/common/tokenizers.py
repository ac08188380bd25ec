"""Which tokenizer a command asks for, and which pictures it takes."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from common.network import SmallDecoder, SmallEncoder
from xq.models import Tokenizer, presets
from xq.models.checkpoints import load_checkpoint

# that can be made without an argument
PRESETS = sorted(
    name
    for name, make in vars(presets).items()
    if inspect.isfunction(make)
    and all(p.default is not p.empty for p in inspect.signature(make).parameters.values())
)
# a side that the strides of all tokenizers divide
_PROBE = 64


def load_tokenizer(
    folder: str | None,
    checkpoint: str | None,
    preset: str | None,
    classes: Sequence[type | Callable[..., Any]] = (),
) -> tuple[Tokenizer, str]:
    """The tokenizer of one of these, in eval mode, and what to call it.

    Without any, it is `presets.tiny`, whose weights come with xq.

    Args:
        folder: What `save_pretrained` wrote.
        checkpoint: A file of another project.
        preset: The name of an architecture, which gets random weights; tiny's are trained.
        classes: Of one's own, which the folder's configuration names.

    Raises:
        OSError: If it is not there.
        ValueError: If it cannot be read, or is no tokenizer.
    """
    if preset and preset != "tiny":
        note = "RANDOM WEIGHTS, so its pictures are noise; --checkpoint FILE takes trained ones"
        return getattr(presets, preset)().eval(), f"{preset} with {note}"
    if checkpoint:
        found = load_checkpoint(checkpoint)
        if not isinstance(found, Tokenizer):
            raise ValueError(f"{checkpoint} holds a {type(found).__name__}, no tokenizer")
        return found.eval(), checkpoint
    if folder:
        known = [SmallEncoder, SmallDecoder, *classes]
        return Tokenizer.from_pretrained(folder, classes=known).eval(), folder
    return presets.tiny(pretrained=True), "tiny, whose weights come with xq"


def image_channels(tokenizer: Tokenizer) -> int:
    """1 for a tokenizer of grey pictures."""
    return getattr(tokenizer.encoder, "image_channels", 3)


@torch.no_grad()
def native_side(tokenizer: Tokenizer) -> int | None:
    """The side of the squares that it takes; None if it takes any.

    Raises:
        ValueError: If it takes no squares.
    """
    size = getattr(tokenizer.encoder, "image_size", None)
    if size is None and tokenizer.quantizer.scales:
        weight = next(tokenizer.encoder.parameters())
        shape = 1, image_channels(tokenizer), _PROBE, _PROBE
        probe = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        stride = _PROBE // tokenizer.encoder(probe).shape[1]
        size = [stride * n for n in tokenizer.quantizer.grids[-1]]
    if size is None or isinstance(size, int):
        return size
    if len(set(size)) > 1:
        raise ValueError(
            f"the tokenizer takes images of {tuple(size)} pixels, and pictures are cropped to "
            "squares; give it square scales: tokenizer.with_scales(...)"
        )
    return size[0]
