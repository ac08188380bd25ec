"""Which tokenizer a command asks for, and which pictures it takes."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common.network import SmallDecoder, SmallEncoder
from xq.models import Tokenizer, presets
from xq.models.checkpoints import load_checkpoint

TRAINED = "runs/msbr10p2/tokenizer"  # where examples/demo.py writes
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

    Args:
        folder: What `save_pretrained` wrote.
        checkpoint: A file of another project.
        preset: The name of an architecture, which gets random weights.
        classes: Of one's own, which the folder's configuration names.

    Raises:
        OSError: If it is not there.
        ValueError: If it cannot be read, or is no tokenizer.
    """
    if preset:
        return getattr(presets, preset)().eval(), f"{preset} with RANDOM WEIGHTS"
    if checkpoint:
        found = load_checkpoint(checkpoint)
        if not isinstance(found, Tokenizer):
            raise ValueError(f"{checkpoint} holds a {type(found).__name__}, no tokenizer")
        return found.eval(), checkpoint
    name = folder or TRAINED
    if not folder and not Path(TRAINED).is_dir():
        raise FileNotFoundError(
            f"give --tokenizer, --checkpoint or --preset; {TRAINED} is not there, which "
            "examples/demo.py writes"
        )
    known = [SmallEncoder, SmallDecoder, *classes]
    return Tokenizer.from_pretrained(name, classes=known).eval(), name


@torch.no_grad()
def native_side(tokenizer: Tokenizer) -> int | None:
    """The side of the squares that it takes; None if it takes any.

    Raises:
        ValueError: If it takes no squares.
    """
    size = getattr(tokenizer.encoder, "image_size", None)
    if size is None and tokenizer.quantizer.scales:
        weight = next(tokenizer.encoder.parameters())
        probe = torch.zeros(1, 3, _PROBE, _PROBE, dtype=weight.dtype, device=weight.device)
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
