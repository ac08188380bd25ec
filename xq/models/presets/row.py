"""A line of the table of presets."""

from collections.abc import Callable
from typing import NamedTuple

from xq.models.tokenizer import Tokenizer


class Row(NamedTuple):
    """A published tokenizer.

    Attributes:
        name: As the table prints it.
        make: Builds it with random weights.
        image_size: Side of the images that its numbers are for.
        rfid: The published reconstruction FID on ImageNet at that size; None where none is known.
        source: Where that number stands.
    """

    name: str
    make: Callable[[], Tokenizer]
    image_size: int
    rfid: float | None
    source: str
