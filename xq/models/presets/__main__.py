"""Prints the table of presets: `python -m xq.models.presets`."""

import importlib
import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from xq.models.presets.row import Row
from xq.models.tokenizer import Tokenizer
from xq.quantizers import Codebook

_MODULES = ("xqgan", "convolutional", "transformers", "trained")
_HEAD = (
    "preset",
    "parameters",
    "image",
    "tokens",
    "bits",
    "rFID published, not measured here",
    "source",
)


class Size(NamedTuple):
    """What a tokenizer needs and gives.

    Attributes:
        parameters: Numbers that are learned, codes that follow averages included.
        positions: Tokens an image.
        indices: Indices a token.
        bits: Bits an image.
    """

    parameters: int
    positions: int
    indices: int
    bits: float


def rows() -> list[Row]:
    """The rows of all presets."""
    modules = [importlib.import_module(f"xq.models.presets.{name}") for name in _MODULES]
    return [row for module in modules for row in module.ROWS]


@torch.no_grad()
def measure(row: Row) -> Size:
    """The size of a preset, which is built without memory for its weights."""
    with torch.device("meta"):
        tokenizer = row.make()
        image = torch.empty(1, 3, row.image_size, row.image_size)
    quantizer: Any = tokenizer.eval().quantizer
    if quantizer.scales:
        positions = quantizer.num_tokens
    else:
        positions = tokenizer.encoder(image).numel() // quantizer.dim
    indices = math.prod(quantizer.code_shape)
    return Size(_parameters(tokenizer), positions, indices, positions * quantizer.bits)


def _parameters(tokenizer: Tokenizer) -> int:
    learned = sum(parameter.numel() for parameter in tokenizer.parameters())
    return learned + sum(_averaged(part) for part in tokenizer.modules())


def _averaged(part: nn.Module) -> int:
    """How many numbers the codes have if they are no parameters."""
    if isinstance(part, Codebook) and not list(part.parameters()):
        return part.codebook_size * part.dim
    return 0


def table(rows: Sequence[Row]) -> str:
    """The rows, aligned."""
    lines = [_HEAD, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    # names and sources begin at the left, numbers end at the right
    left = {0, len(_HEAD) - 1}
    texts = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    texts.insert(1, "-" * max(map(len, texts)))
    notes = (
        "rFID is the reconstruction FID on ImageNet; lower is better, more bits make it easier.",
        "Parameters include the codes. 2 x 256 tokens are two indices at each of 256 places.",
    )
    return "\n".join([*texts, "", *notes])


def _cells(row: Row) -> tuple[str, ...]:
    size = measure(row)
    return (
        row.name,
        f"{size.parameters / 1e6:.1f} M",
        str(row.image_size),
        f"{size.indices} x {size.positions}" if size.indices > 1 else str(size.positions),
        f"{size.bits:.0f}",
        "-" if row.rfid is None else f"{row.rfid:.2f}",
        row.source if row.rfid is not None else "",
    )


if __name__ == "__main__":
    sys.stdout.write(table(rows()) + "\n")
