"""What composites ask of the quantizers that they are given."""

from collections.abc import Sequence
from typing import Any

from xq.quantizers.base import Quantizer


def listed(owner: str, quantizer: Quantizer | Sequence[Quantizer]) -> list[Quantizer]:
    """The quantizers handed in, one or several, checked to be such.

    Raises:
        TypeError: If one is no `Quantizer`.
        ValueError: If there is none.
    """
    given = list(quantizer) if isinstance(quantizer, Sequence) else [quantizer]
    if not given:
        raise ValueError(f"{owner} got an empty list of quantizers")
    for item in given:
        if not isinstance(item, Quantizer):
            raise TypeError(
                f"{owner} takes quantizers, got {type(item).__name__}; wrappers (ChannelFirst, "
                "Projected) stand at the root, around the whole tree"
            )
    return given


def check_alike(owner: str, children: Sequence[Quantizer], names: Sequence[str]) -> None:
    """All children agree in the attributes `names`.

    Raises:
        ValueError: If two differ.
    """
    for name in names:
        values: list[Any] = [getattr(child, name) for child in children]
        for k, value in enumerate(values):
            if value != values[0]:
                raise ValueError(
                    f"{owner} needs children with the same {name}, got {values[0]!r} for "
                    f"{type(children[0]).__name__} 0 and {value!r} for "
                    f"{type(children[k]).__name__} {k}"
                )
