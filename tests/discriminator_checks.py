"""What the tests of discriminators share."""

from pathlib import Path

from torch import nn

GOLDEN = Path(__file__).parent / "golden" / "xqgan_discriminators.txt"


def golden_shapes(prefix: str) -> dict[str, tuple[int, ...]]:
    """XQ-GAN's parameters and buffers, by name."""
    rows = (line.split() for line in GOLDEN.read_text().splitlines())
    return {
        key.removeprefix(prefix): tuple(map(int, shape))
        for key, *shape in rows
        if key.startswith(prefix)
    }


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}
