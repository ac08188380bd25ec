"""Pictures in the IDX format of MNIST, such as Fashion-MNIST."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

# where Debian's dataset-fashion-mnist puts them; elsewhere, pass a folder
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
PARTS = ("train", "t10k")
_UINT8 = 8
# of 28 x 28 pixels it makes 32 x 32, which strides divide
_BORDER = 2


class Idx:
    """Pictures and labels of one part of an MNIST, in the order of the file.

    They get a border of two black pixels, which makes 28 x 28 pixels 32 x 32.

    Args:
        folder: Of the four files, compressed by gzip.
        part: "train" or "t10k".
    """

    def __init__(self, folder: Path, part: str) -> None:
        self.pixels = _read(folder / f"{part}-images-idx3-ubyte.gz", 3)
        self.labels = _read(folder / f"{part}-labels-idx1-ubyte.gz", 1)
        if len(self.pixels) != len(self.labels):
            raise ValueError(
                f"{folder} has {len(self.pixels)} pictures and {len(self.labels)} labels in its "
                f"part {part}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: range) -> Iterator[tuple[Any, int]]:
        for pixels, label in zip(self.pixels[rows], self.labels[rows], strict=True):
            yield ImageOps.expand(Image.fromarray(pixels), _BORDER), int(label)


def _read(path: Path, axes: int) -> np.ndarray:
    try:
        data = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is not there; on Debian and Ubuntu: apt-get install dataset-fashion-mnist"
        ) from error
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    start = 4 + 4 * axes
    shape = tuple(int(n) for n in np.frombuffer(data[4:start], ">u4"))
    values = np.frombuffer(data, np.uint8, offset=min(start, len(data)))
    if data[:4] != bytes((0, 0, _UINT8, axes)) or values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} is damaged, or no IDX file of bytes with {axes} axes")
    return values.reshape(shape)
