"""Labelled pictures by row number: of the demo, of a folder, of WebDataset shards."""

import importlib.util
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from common.data import find_pictures, read, tiles, to_image, to_tensor
from common.idx import FASHION_MNIST, Idx

# what WebDataset shards name their pictures
PICTURES = ("jpg", "jpeg", "png", "webp")
FASHION = {"fashion-mnist": "train", "fashion-mnist-test": "t10k"}


class Samples(Protocol):
    """A data set whose rows stay where they are, so that encoding can go on at any of them."""

    def __len__(self) -> int: ...

    def read(self, rows: range) -> Iterator[tuple[Any, int]]:
        """What `picture` takes, and a label, of some consecutive rows."""
        ...


def find_samples(source: str) -> Samples:
    """The rows of "demo", of a folder of pictures, or of .tar shards: a file or a folder of them.

    "fashion-mnist" and "fashion-mnist-test" are the parts of that data set, where it is installed.

    Raises:
        OSError: If it is not there.
        ValueError: If it holds no pictures.
    """
    if source == "demo":
        return Tiles([path for part in find_pictures("demo") for path in part])
    if source in FASHION:
        return Idx(FASHION_MNIST, FASHION[source])
    path = Path(source)
    shards = [path] if path.is_file() else sorted(path.rglob("*.tar"))
    if shards:
        return Shards(shards)
    if not path.is_dir():
        raise FileNotFoundError('is no folder; --data takes "demo", a folder or a .tar file')
    return Folder(path)


def picture(source: Any, side: int) -> UInt8[Tensor, "3 {side} {side}"]:
    """A file or an image: its middle, as large as fits, at `side` by `side` pixels."""
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        with image:
            # transparent parts lie on white
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            scale = side / min(image.size)
            w, h = (max(round(length * scale), side) for length in image.size)
            x, y = (w - side) // 2, (h - side) // 2
            image = image.convert("RGB").resize((w, h), Image.Resampling.LANCZOS)
            return to_tensor(image.crop((x, y, x + side, y + side)))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{source} cannot be read as an image ({error})") from error


class Tiles:
    """Tiles of pictures, labelled by picture.

    Args:
        paths: The pictures.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        cut = [tiles([read(path)]) for path in paths]
        self.rows = [(to_image(tile), label) for label, part in enumerate(cut) for tile in part]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: range) -> Iterator[tuple[Any, int]]:
        yield from self.rows[rows.start : rows.stop]


class Folder:
    """Files below a folder, sorted; those of one folder have one label.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        known = Image.registered_extensions()
        self.files = sorted(p for p in path.rglob("*") if p.suffix.lower() in known)
        if not self.files:
            raise ValueError("holds neither pictures nor .tar shards")
        folders = sorted({file.parent for file in self.files})
        self.labels = {folder: label for label, folder in enumerate(folders)}

    def __len__(self) -> int:
        return len(self.files)

    def read(self, rows: range) -> Iterator[tuple[Any, int]]:
        for file in self.files[rows.start : rows.stop]:
            yield file, self.labels[file.parent]


class Shards:
    """Samples of a picture each, and of a `cls` file with its label, -1 without one.

    Args:
        paths: The .tar files; their headers are read to number the rows.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        if importlib.util.find_spec("webdataset") is None:
            raise ValueError("holds shards, which webdataset reads: pip install webdataset")
        self.paths = paths
        self.starts = [0, *itertools.accumulate(map(_count, paths))]
        if not self.starts[-1]:
            raise ValueError(f"holds no {', '.join(PICTURES)} in its shards")

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, rows: range) -> Iterator[tuple[Any, int]]:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        for path, start, stop in zip(self.paths, self.starts, self.starts[1:], strict=False):
            here = range(max(rows.start, start) - start, min(rows.stop, stop) - start)
            if not here:
                continue
            # its whole pipeline would shuffle, split, and leave files open
            with path.open("rb") as stream:
                members = tar_file_expander([{"url": str(path), "stream": stream}])
                found = (sample for sample in group_by_keys(members) if _kind(sample))
                for sample in itertools.islice(found, here.start, here.stop):
                    yield BytesIO(sample[_kind(sample)]), int(sample.get("cls", -1))


def _kind(sample: dict[str, Any]) -> str:
    return next((name for name in PICTURES if name in sample), "")


def _count(shard: Path) -> int:
    try:
        with tarfile.open(shard) as file:
            names = [member.name.rpartition("/")[2].lower() for member in file if member.isfile()]
    except tarfile.TarError as error:
        raise ValueError(f"{shard} cannot be read as a shard ({error})") from error
    return sum(name.partition(".")[2] in PICTURES for name in names)
