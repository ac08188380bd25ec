"""Photographs: which there are, random crops to train on, tiles to test on."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

CROP = 64
# public domain and CC0, in the scikit-image wheel
DEMO_TRAIN = ("astronaut.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg")
DEMO_HELD_OUT = "chelsea.png"
# larger pictures are halved, so that a crop shows something
LARGEST = 800
LEVELS = (1.0, 0.7, 0.5)
# pictures in memory at a time; of a larger folder, one is exchanged a batch
POOL = 64


def find_pictures(source: str) -> tuple[list[Path], list[Path]]:
    """Files to train on and files held out: "demo", or a folder with all that is below it.

    Of a folder the last tenth by name is held out, one file at least.

    Raises:
        FileNotFoundError: If the folder, or scikit-image, is not there.
        ValueError: If there are fewer than two pictures, or one cannot be read or is too small.
    """
    if source == "demo":
        spec = importlib.util.find_spec("skimage")
        if spec is None or spec.origin is None:
            raise FileNotFoundError(
                "the demo's photographs come with scikit-image: pip install scikit-image"
            )
        folder = Path(spec.origin).parent / "data"
        return [folder / name for name in DEMO_TRAIN], [folder / DEMO_HELD_OUT]
    if not Path(source).is_dir():
        raise FileNotFoundError(f'{source} is no folder; --data takes "demo" or a folder of images')
    known = Image.registered_extensions()
    files = sorted(p for p in Path(source).rglob("*") if p.suffix.lower() in known and p.is_file())
    if len(files) < 2:
        raise ValueError(
            f"{source} holds {len(files)} images; two are needed, one of them to test on"
        )
    for path in files:
        _check(path)
    held_out = max(len(files) // 10, 1)
    return files[:-held_out], files[-held_out:]


def read(path: Path) -> UInt8[Tensor, "3 h w"]:
    """A picture in RGB, halved while its longer side exceeds `LARGEST` and a crop still fits."""
    try:
        with Image.open(path) as image:
            factor = 1
            while max(image.size) > LARGEST * factor and min(image.size) >= 2 * CROP * factor:
                factor *= 2
            # transparent parts lie on white
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            return to_tensor(image.convert("RGB").reduce(factor))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def to_tensor(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """A PIL image in RGB as a tensor."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(pixels: UInt8[Tensor, "3 h w"]) -> Image.Image:
    """A tensor as a PIL image."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def to_float(pixels: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Bytes to [-1, 1], as the networks take them."""
    return pixels.float() / 127.5 - 1


def to_bytes(image: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """[-1, 1] to bytes."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).byte()


def whole_tiles(picture: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "3 H W"]:
    """The upper left part that tiles of `CROP` pixels fill."""
    h, w = (side // CROP * CROP for side in picture.shape[1:])
    return picture[:, :h, :w]


def tiles(pictures: Sequence[UInt8[Tensor, "3 h w"]]) -> UInt8[Tensor, "n 3 crop crop"]:
    """All pictures cut into tiles, row by row."""
    cut = [whole_tiles(p).unfold(1, CROP, CROP).unfold(2, CROP, CROP) for p in pictures]
    return torch.cat([t.permute(1, 2, 0, 3, 4).flatten(0, 1) for t in cut])


class Crops:
    """Draws batches of random crops: picture, size, place, flip and transposition at random.

    Args:
        paths: The pictures.
        seed: Of the crops and of the order in which a large folder is read.
    """

    def __init__(self, paths: Sequence[Path], seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.waiting = [paths[i] for i in self.random.permutation(len(paths))]
        first, self.waiting = self.waiting[:POOL], self.waiting[POOL:]
        self.pool = [(path, _pyramid(read(path))) for path in first]

    def batch(self, size: int) -> Float[Tensor, "{size} 3 crop crop"]:
        """A batch in [-1, 1]."""
        if self.waiting:
            place = self.random.integers(len(self.pool))
            self.waiting.append(self.pool[place][0])
            path = self.waiting.pop(0)
            self.pool[place] = (path, _pyramid(read(path)))
        return to_float(torch.stack([self._crop() for _ in range(size)]))

    def _crop(self) -> UInt8[Tensor, "3 crop crop"]:
        levels = self.pool[self.random.integers(len(self.pool))][1]
        picture = levels[self.random.integers(len(levels))]
        y, x = (self.random.integers(side - CROP + 1) for side in picture.shape[1:])
        crop = picture[:, y : y + CROP, x : x + CROP]
        if self.random.random() < 0.5:
            crop = crop.flip(2)
        return crop.transpose(1, 2) if self.random.random() < 0.25 else crop


def _pyramid(picture: UInt8[Tensor, "3 h w"]) -> list[UInt8[Tensor, "3 h w"]]:
    """The picture at several sizes, those that still hold a crop."""
    image = to_image(picture)
    sizes = [tuple(round(side * level) for side in image.size) for level in LEVELS]
    resized = [image.resize(size, Image.Resampling.BOX) for size in sizes if min(size) >= CROP]
    return [to_tensor(level) for level in resized]


def _check(path: Path) -> None:
    """Looks at the head of a file: thousands take seconds."""
    try:
        with Image.open(path) as image:
            size = image.size
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from error
    if min(size) < CROP:
        raise ValueError(
            f"{path} is too small: {size[0]} x {size[1]} pixels, and crops are {CROP} x {CROP}"
        )
