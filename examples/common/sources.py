"""Labelled pictures by number, in any order: files of a folder, or members of .tar shards."""

import glob
import hashlib
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from common.data import find_pictures, read, to_image

# what WebDataset names pictures
_PICTURES = ("jpg", "jpeg", "png", "webp", "tif", "tiff")
# side of the parts into which the demo's photographs are cut
_TILE = 128
_ROW = np.dtype([("shard", "i4"), ("label", "i4"), ("offset", "i8"), ("size", "i8")])


class Source(Protocol):
    """Pictures that can be opened one by one.

    Attributes:
        labels: Of each picture, -1 for none.
        groups: For each picture, the number of the shard that it is read from.
    """

    labels: np.ndarray
    groups: np.ndarray

    def __len__(self) -> int: ...

    def open(self, row: int) -> tuple[Path | BytesIO, str]:
        """What PIL opens, and a name for messages."""
        ...


def find_source(name: str, cache: Path | None = None) -> Source:
    """The pictures of the demo, of a folder, of a .tar file, or of a folder or pattern of these.

    Args:
        name: Which; the demo's are "demo" and "demo held out".
        cache: A folder that keeps the index of shards, which takes a while to make.

    Raises:
        OSError: If it is not there.
        ValueError: If it holds no pictures.
    """
    if name in ("demo", "demo held out"):
        return Tiles(find_pictures("demo")[name != "demo"])
    path = Path(name)
    if path.is_dir():
        shards = sorted(path.rglob("*.tar"))
        return Shards(shards, cache) if shards else Files.below(path)
    shards = [Path(each) for each in sorted(glob.glob(name))]
    if shards and all(shard.suffix == ".tar" for shard in shards):
        return Shards(shards, cache)
    raise FileNotFoundError(f'{name} is neither "demo", nor a folder, nor .tar files')


class Files:
    """Pictures in files; those of one folder are of one class.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [str(path) for path in paths]
        folders = {folder: i for i, folder in enumerate(sorted({p.parent for p in paths}))}
        self.labels = np.array([folders[path.parent] for path in paths], dtype=np.int32)
        # shared by all, so that any is read with any other
        self.groups = np.zeros(len(paths), dtype=np.int32)

    @classmethod
    def below(cls, folder: Path) -> "Files":
        """All pictures below a folder, sorted by name."""
        known = Image.registered_extensions()
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known)
        if not found:
            raise ValueError(f"{folder} holds neither pictures nor .tar files")
        return cls(found)

    def __len__(self) -> int:
        return len(self.paths)

    def open(self, row: int) -> tuple[Path, str]:
        return Path(self.paths[row]), self.paths[row]


class Tiles:
    """Parts of a few photographs, each a class.

    Args:
        paths: The photographs.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.tiles: list[bytes] = []
        labels = []
        for label, path in enumerate(paths):
            picture = to_image(read(path))
            columns, rows = (side // _TILE for side in picture.size)
            for x, y in product(range(columns), range(rows)):
                left, top, data = x * _TILE, y * _TILE, BytesIO()
                picture.crop((left, top, left + _TILE, top + _TILE)).save(data, "png")
                self.tiles.append(data.getvalue())
                labels.append(label)
        self.labels = np.array(labels, dtype=np.int32)
        self.groups = np.zeros(len(labels), dtype=np.int32)

    def __len__(self) -> int:
        return len(self.tiles)

    def open(self, row: int) -> tuple[BytesIO, str]:
        return BytesIO(self.tiles[row]), f"tile {row} of the demo"


class Shards:
    """Pictures in tar files as WebDataset writes them, with their `cls` as label.

    A picture is found by the place of its bytes, so that training can go on at any of them. That
    index takes 24 bytes a picture, and is mapped, not loaded.

    Args:
        paths: The files.
        cache: Where the index is kept, for as long as the files stay as they are.
    """

    def __init__(self, paths: Sequence[Path], cache: Path | None = None) -> None:
        self.paths = [str(path) for path in paths]
        stamp = [f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in paths]
        kept = None if cache is None else cache / f"shards-{_digest(stamp)}.npy"
        if kept is not None and kept.is_file():
            self.rows = np.load(kept, mmap_mode="r")
        else:
            with ThreadPoolExecutor() as pool:
                self.rows = np.concatenate(list(pool.map(_index, range(len(paths)), paths)))
            if kept is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                part = kept.with_suffix(f".{os.getpid()}.npy")
                np.save(part, self.rows)
                part.replace(kept)
        if not len(self.rows):
            raise ValueError(f"the .tar files hold no {', '.join(_PICTURES)}, such as {paths[0]}")
        self.labels, self.groups = self.rows["label"], self.rows["shard"]

    def __len__(self) -> int:
        return len(self.rows)

    def open(self, row: int) -> tuple[BytesIO, str]:
        shard, _, offset, size = (int(value) for value in self.rows[row])
        with open(self.paths[shard], "rb") as file:
            file.seek(offset)
            return BytesIO(file.read(size)), f"{self.paths[shard]} at byte {offset}"


def chosen(source: Source, per_class: int, seed: int) -> range | np.ndarray:
    """The numbers of all pictures, or of at most so many of each class, drawn at random.

    Raises:
        ValueError: If pictures lack classes.
    """
    if not per_class:
        return range(len(source))
    labels = np.asarray(source.labels)
    if labels.min() < 0:
        raise ValueError("data.per_class needs classes: a folder each, or .cls files in the shards")
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    return np.sort(order[rank < per_class])


def split(
    train: Source, held_out: Source | None, per_class: int, seed: int
) -> tuple[range | np.ndarray, Source, range | np.ndarray]:
    """Rows to train on, and a source and its rows to test on: every tenth if there is no other.

    Raises:
        ValueError: If nothing would be left.
    """
    rows = chosen(train, per_class, seed)
    if held_out is not None:
        return rows, held_out, range(len(held_out))
    if len(rows) < 2:
        raise ValueError(f"data.train has {len(rows)} pictures; two are needed, one to test on")
    tenth = np.arange(len(rows)) % 10 == min(len(rows), 10) - 1
    rows = np.asarray(rows)
    return rows[~tenth], train, rows[tenth]


def _index(number: int, path: Path) -> np.ndarray:
    """Where the pictures of a shard lie; files of one name but for the ending are one sample."""
    labels: dict[str, int] = {}
    found: list[tuple[str, int, int]] = []
    try:
        with tarfile.open(path, "r:") as file:
            for member in file:
                stem, _, kind = member.name.rpartition("/")[2].partition(".")
                key = member.name[: len(member.name) - len(kind)] or stem
                if kind == "cls":
                    content: Any = file.extractfile(member)
                    labels[key] = int(content.read())
                elif kind.lower() in _PICTURES:
                    found.append((key, member.offset_data, member.size))
    except (tarfile.TarError, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a shard ({error})") from error
    rows = [(number, labels.get(key, -1), offset, size) for key, offset, size in found]
    return np.array(rows, dtype=_ROW)


def _digest(stamp: list[str]) -> str:
    return hashlib.sha256("\n".join(stamp).encode()).hexdigest()[:16]
