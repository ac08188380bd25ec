"""Pictures to square crops in [-1, 1], as ADM cuts them (Dhariwal and Nichol 2021)."""

import math
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

_DEEPEST = 65535


class BrokenPicture(ValueError):
    """A picture that cannot be read."""

    def __str__(self) -> str:
        # a process that loads for another puts its traceback before
        return super().__str__().rpartition("BrokenPicture: ")[2].strip()


def read_crop(
    file: Path | BytesIO,
    name: str,
    size: int,
    channels: int,
    random: np.random.Generator | None = None,
    flip: bool = False,
    zoom: float = 1.25,
) -> Float[Tensor, "{channels} {size} {size}"]:
    """A random crop at a random size, perhaps flipped; without `random`, the middle.

    Sides are halved by averaging while they are twice too long, then resized bicubically: the
    shorter one to `size` for the middle, and to up to `zoom` times that before a random crop.
    Pictures of 16 bits keep them. Transparent parts lie on white.

    Args:
        file: What PIL opens.
        name: For messages.
        size: Side of the crop.
        channels: 3, or 1 for grey.
        random: Where draws come from.
        flip: Whether half of the crops are mirrored.
        zoom: ADM's is 1.25.

    Raises:
        BrokenPicture: If it cannot be read.
    """
    try:
        with Image.open(file) as opened:
            picture = _in_channels(opened, channels, name)
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise BrokenPicture(f"{name} cannot be read as an image ({error})") from error
    shorter = size
    if random is not None:
        shorter = int(random.integers(size, math.ceil(size * zoom) + 1))
    picture = _resized(picture, shorter)
    spare_x, spare_y = (side - size for side in picture.size)
    x, y = spare_x // 2, spare_y // 2
    if random is not None:
        x, y = int(random.integers(spare_x + 1)), int(random.integers(spare_y + 1))
    picture = picture.crop((x, y, x + size, y + size))
    if random is not None and flip and random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = torch.from_numpy(np.array(picture, dtype=np.float32)) / 127.5 - 1
    values = values[None] if values.ndim == 2 else values.permute(2, 0, 1)
    return values.clamp(-1, 1).expand(channels, -1, -1).contiguous()


def _in_channels(picture: Image.Image, channels: int, name: str) -> Image.Image:
    """RGB or grey; of more than 8 bits, grey as floats from 0 to 255."""
    if picture.mode.startswith(("I", "F")):
        values = np.array(picture, dtype=np.float32)
        if picture.mode == "F" or values.min() < 0 or values.max() > _DEEPEST:
            raise BrokenPicture(
                f"{name} has values from {values.min():g} to {values.max():g} in mode "
                f"{picture.mode}; pictures of 8 or 16 bits without sign are read"
            )
        return Image.fromarray(values * (255 / _DEEPEST))
    if picture.mode not in ("RGB", "L"):
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return picture.convert("L" if channels == 1 else "RGB")


def _resized(picture: Image.Image, shorter: int) -> Image.Image:
    while min(picture.size) >= 2 * shorter:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = shorter / min(picture.size)
    width, height = (max(round(side * scale), shorter) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)
