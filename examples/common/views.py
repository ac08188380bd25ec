"""Two looks at one place: random crops of tiles of pictures."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from common.data import find_pictures, read, to_float

# every view is resized to this side
VIEW = 128
# views of each tile to train on
VIEWS = 4


def load_views(
    source: str, side: int, seed: int
) -> tuple[Float[Tensor, "n views 3 h w"], Float[Tensor, "m 2 3 h w"]]:
    """Random crops of tiles: several of each to train on, two of every fourth, held out.

    The second of two is grey, since colours alone would tell where it comes from.

    Args:
        source: "demo" or a folder of pictures.
        side: Of a tile.
        seed: For the crops.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there are fewer than eight tiles.
    """
    paths = [path for part in find_pictures(source) for path in part]
    cut = [_tiles(read(path), side) for path in paths]
    tiles = torch.cat(cut)
    held_out = torch.arange(len(tiles)) % 4 == 3
    if held_out.sum() < 2:
        raise ValueError(f"--data {source} has {len(tiles)} tiles of {side} pixels, below 8")
    random = np.random.default_rng(seed)
    train = torch.stack([_views(tile, VIEWS, random) for tile in tiles[~held_out]])
    pairs = torch.stack([_views(tile, 2, random) for tile in tiles[held_out]])
    pairs[:, 1] = pairs[:, 1].mean(1, keepdim=True)
    return train, pairs


def _tiles(picture: UInt8[Tensor, "3 h w"], side: int) -> UInt8[Tensor, "n 3 side side"]:
    height, width = (length // side for length in picture.shape[1:])
    whole = picture[:, : height * side, : width * side]
    return whole.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)


def _views(tile: UInt8[Tensor, "3 h w"], count: int, random: np.random.Generator) -> Tensor:
    found = []
    for _ in range(count):
        side = int(random.integers(int(0.6 * tile.shape[1]), int(0.9 * tile.shape[1])))
        y, x = (random.integers(tile.shape[1] - side + 1) for _ in range(2))
        crop = to_float(tile[None, :, y : y + side, x : x + side])
        crop = crop.flip(3) if random.random() < 0.5 else crop
        found.append(F.interpolate(crop, size=VIEW, mode="bilinear", antialias=True)[0])
    return torch.stack(found)
