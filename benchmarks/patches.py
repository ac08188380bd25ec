"""Patches of photographs, as vectors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from examples.common.data import find_pictures, read

SIDE = 4
DIM = 3 * SIDE**2


@dataclass(frozen=True)
class Patches:
    """Vectors to train on and others to test on, without the mean of the first.

    Attributes:
        words: What they are.
        variance: Of the test vectors, a dimension.
    """

    train: Float[Tensor, "n dim"]
    test: Float[Tensor, "m dim"]
    words: str

    @property
    def variance(self) -> float:
        return self.test.double().square().mean().item()


def patches(source: str, train: int, test: int) -> Patches:
    """Random patches of 4 x 4 pixels, in [0, 1], as many of each picture.

    Args:
        source: "demo" for the pictures of scikit-image, or a folder. Where that has a `train` and a
            `val`, one is trained on and the other tested on; else the last tenth by name is held
            out.
        train: How many vectors to train on.
        test: How many to test on.

    Raises:
        FileNotFoundError: If the folder, or scikit-image, is not there.
        ValueError: If there are fewer than two pictures, or one cannot be read.
    """
    seen, held_out = split(source)
    x = _drawn(seen, train, torch.Generator().manual_seed(0))
    y = _drawn(held_out, test, torch.Generator().manual_seed(1))
    mean = x.mean(0)
    return Patches(x - mean, y - mean, words(source, len(seen), len(held_out)))


def words(source: str, seen: int, held_out: int) -> str:
    """So many pictures of which source, without the way to it."""
    name = Path(source).resolve().name
    name = "scikit-image's photographs" if source == "demo" else f'photographs in "{name}"'
    return f"{seen} of {name} to train on, {held_out} to test on"


def split(source: str) -> tuple[list[Path], list[Path]]:
    """Files to train on and files to test on: see `patches`."""
    folders = [Path(source) / name for name in ("train", "val")]
    if source == "demo" or not all(folder.is_dir() for folder in folders):
        return find_pictures(source)
    # in each the two parts that it would have alone
    (a, b), (c, d) = (find_pictures(str(folder)) for folder in folders)
    return a + b, c + d


def _drawn(paths: Sequence[Path], count: int, generator: torch.Generator) -> Tensor:
    each = -(-count // len(paths))
    drawn = torch.cat([_of_picture(path, each, generator) for path in paths])
    return drawn[torch.randperm(len(drawn), generator=generator)[:count]]


def _of_picture(path: Path, count: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
    windows = read(path).unfold(1, SIDE, 1).unfold(2, SIDE, 1)
    y, x = (torch.randint(windows.shape[i], (count,), generator=generator) for i in (1, 2))
    # pixel by pixel, so that a part of a product is a piece of the patch
    return windows[:, y, x].permute(1, 2, 3, 0).reshape(count, DIM).float() / 255
