"""Random views of places: each is another crop, in other colours."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from common.data import find_pictures, read, to_float

# every view is resized to this side
VIEW = 128
# of the side of a tile
SMALLEST = 0.5
# how far brightness, contrast and saturation go from 1
JITTER = 0.4
GREY = 0.2


def load_tiles(
    source: str, side: int
) -> tuple[UInt8[Tensor, "n 3 side side"], UInt8[Tensor, "m 3 side side"]]:
    """Tiles of the pictures to train on, and every fourth, held out.

    Args:
        source: "demo" or a folder of pictures.
        side: Of a tile.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there are fewer than eight tiles.
    """
    paths = [path for part in find_pictures(source) for path in part]
    tiles = torch.cat([_tiles(read(path), side) for path in paths])
    held_out = torch.arange(len(tiles)) % 4 == 3
    if held_out.sum() < 2:
        raise ValueError(f"--data {source} has {len(tiles)} tiles of {side} pixels, below 8")
    return tiles[~held_out], tiles[held_out]


def random_views(
    tiles: UInt8[Tensor, "n 3 side side"], random: np.random.Generator
) -> Float[Tensor, "n 3 view view"]:
    """A view of each tile in [-1, 1]: a crop, perhaps flipped, in changed colours or grey."""
    views = torch.cat([_crop(tile, random) for tile in tiles])
    brightness, contrast, saturation = (
        _per_view(random.uniform(1 - JITTER, 1 + JITTER, len(views))) for _ in range(3)
    )
    saturation = saturation.where(_per_view(random.random(len(views))) >= GREY, 0)
    views = _stretch(views, views.mean(1, keepdim=True), saturation)
    views = _stretch(views, views.mean((1, 2, 3), keepdim=True), contrast)
    return ((views + 1) * brightness - 1).clamp(-1, 1)


def _tiles(picture: UInt8[Tensor, "3 h w"], side: int) -> UInt8[Tensor, "n 3 side side"]:
    height, width = (length // side for length in picture.shape[1:])
    whole = picture[:, : height * side, : width * side]
    return whole.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)


def _crop(tile: UInt8[Tensor, "3 h w"], random: np.random.Generator) -> Tensor:
    whole = tile.shape[1]
    side = int(random.integers(int(SMALLEST * whole), whole + 1))
    y, x = (random.integers(whole - side + 1) for _ in range(2))
    crop = to_float(tile[None, :, y : y + side, x : x + side])
    crop = crop.flip(3) if random.random() < 0.5 else crop
    return F.interpolate(crop, size=VIEW, mode="bilinear", antialias=True)


def _per_view(numbers: np.ndarray) -> Float[Tensor, "n 1 1 1"]:
    return torch.from_numpy(numbers).float()[:, None, None, None]


def _stretch(views: Tensor, centre: Tensor, factor: Tensor) -> Float[Tensor, "n 3 h w"]:
    return centre + (views - centre) * factor
