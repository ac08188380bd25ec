"""Pictures in batches, as published evaluations crop them, shared among processes."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from common.adm import read_crop
from common.data import find_pictures, read, to_bytes, to_image, to_tensor
from common.samples import Folder, Samples
from xq.distributed import rank, world_size

CROP_NOTE = (
    "centre crop of ADM: halved with a box filter while the shorter side is twice the target or "
    "more, its shorter side resized to the target (bicubic), cropped to a square; bytes"
)


class Batch(NamedTuple):
    """This process's part of a batch, which may be empty.

    Attributes:
        rows: Where its pictures stand in the data set.
        pixels: The pictures.
        labels: Their classes.
        whole: Whether the batch, over all processes, is a full one.
    """

    rows: range
    pixels: UInt8[Tensor, "b 3 side side"]
    labels: list[int]
    whole: bool


def find_rows(source: str, side: int) -> Samples:
    """The pictures of a folder; or "demo", overlapping tiles of the photograph held out.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no pictures.
    """
    if source == "demo":
        return HeldOut(side)
    if not Path(source).is_dir():
        raise FileNotFoundError(f"there is no folder {source}")
    try:
        return Folder(Path(source))
    except ValueError as error:
        raise ValueError(f"{source} holds no pictures") from error


class HeldOut:
    """Square tiles of the demo's held-out photograph, each half over the next one.

    Args:
        side: Of a tile, in pixels.

    Raises:
        ValueError: If the photograph is smaller than two of them.
    """

    def __init__(self, side: int) -> None:
        pixels = read(find_pictures("demo")[1][0])
        if min(pixels.shape[1:]) < side or max(pixels.shape[1:]) < side + side // 2:
            raise ValueError(
                f"the demo's photograph of {pixels.shape[2]} x {pixels.shape[1]} pixels has no two "
                f"tiles of {side} x {side}; give --data FOLDER"
            )
        cut = pixels.unfold(1, side, side // 2).unfold(2, side, side // 2)
        self.tiles = [to_image(tile) for tile in cut.permute(1, 2, 0, 3, 4).flatten(0, 1)]

    def __len__(self) -> int:
        return len(self.tiles)

    def read(self, rows: range) -> Iterator[tuple[Any, int]]:
        for tile in self.tiles[rows.start : rows.stop]:
            yield tile, 0


def centre_crop(source: Any, side: int, channels: int = 3) -> UInt8[Tensor, "3 {side} {side}"]:
    """A file as `CROP_NOTE` says; an image, which is a square already, as it is.

    Args:
        source: Which.
        side: Of the square.
        channels: 1 makes all three alike: grey.

    Raises:
        ValueError: If it cannot be read.
    """
    if isinstance(source, Image.Image):
        return to_tensor((source.convert("L") if channels == 1 else source).convert("RGB"))
    return to_bytes(read_crop(source, str(source), side, channels)).expand(3, -1, -1)


def batches(
    samples: Samples, side: int, size: int, threads: int, channels: int = 3
) -> Iterator[Batch]:
    """The pictures in order; threads prepare a batch while the one before is looked at.

    Each process gets a part of each batch, so that `size` counts the pictures of all of them. With
    a single channel they are grey.
    """
    crop = partial(centre_crop, side=side, channels=channels)
    starts = range(0, len(samples), size)
    with ThreadPoolExecutor(threads) as pool:

        def begin(start: int) -> tuple[range, bool, list[int], Iterator[Tensor]]:
            length = min(size, len(samples) - start)
            low, high = (start + length * r // world_size() for r in (rank(), rank() + 1))
            found = list(samples.read(range(low, high)))
            prepared = pool.map(crop, [source for source, _ in found])
            return range(low, high), length == size, [label for _, label in found], prepared

        waiting = map(begin, starts)
        current = next(waiting)
        for following in itertools.chain(waiting, [None]):
            rows, whole, labels, prepared = current
            pixels = list(prepared)
            empty = torch.zeros(0, 3, side, side, dtype=torch.uint8)
            yield Batch(rows, torch.stack(pixels) if pixels else empty, labels, whole)
            if following is not None:
                current = following
