"""The files of one part of a token store, and who may write them."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

_FORMAT, _VERSION = "xq.TokenStore", 1
_SIDECAR = re.compile(r"part-\d{5}-of-(\d{5})\.json")


class Part:
    """Rows of one part: a numpy file, and a sidecar that says what they are and how many.

    A row counts once the sidecar says so; it is replaced in one piece, after the rows are on the
    disk. So whenever a process is killed, all rows that count are whole.

    Args:
        folder: Where the files lie.
        record: What the sidecar says.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.folder, self.record = folder, record
        self._array: np.ndarray | None = None
        self._offset = 0

    @classmethod
    def new(cls, folder: Path, record: dict[str, Any]) -> "Part":
        """A part without rows or files."""
        return cls(folder, {"format": _FORMAT, "version": _VERSION, "filled": 0, **record})

    @classmethod
    def read(cls, sidecar: Path) -> "Part":
        """The part that a sidecar describes.

        Raises:
            ValueError: If the sidecar or its numpy file is damaged.
        """
        try:
            record = json.loads(sidecar.read_text())
            known = (record["format"], record["version"]) == (_FORMAT, _VERSION)
            part = cls(sidecar.parent, record)
            fits = part.file(".json") == sidecar and 0 <= part.filled <= len(part.rows)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{sidecar} is damaged: {error!r}") from error
        if not known or not fits:
            raise ValueError(f"{sidecar} describes no part of a TokenStore of version {_VERSION}")
        # a file that is cut short had better be found now than at a later row
        part.array()
        return part

    def file(self, suffix: str) -> Path:
        """One of its files."""
        rank, world = self.record["part"]
        return self.folder / f"part-{rank:05d}-of-{world:05d}{suffix}"

    @property
    def rows(self) -> range:
        """Rows of the data set that belong here."""
        rank, world = self.record["part"]
        length = self.record["length"]
        return range(length * rank // world, length * (rank + 1) // world)

    @property
    def filled(self) -> int:
        """Rows that count."""
        return self.record["filled"]

    @property
    def dtype(self) -> np.dtype:
        """Of a row: in one piece, so that no tokens are without their label."""
        tokens = np.dtype(self.record["dtype"]).newbyteorder("<")
        return np.dtype([("label", "<i8"), ("tokens", tokens, tuple(self.record["token_shape"]))])

    def array(self) -> "np.ndarray":
        """All rows, also those that do not count yet, mapped from the disk.

        Raises:
            ValueError: If the numpy file is damaged.
        """
        if self._array is not None:
            return self._array
        path, want = self.file(".npy"), (self.dtype, (len(self.rows),))
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged, cut short or not there: {error}") from error
        if (array.dtype, array.shape) != want:
            raise ValueError(
                f"{path} holds {array.shape} rows of {array.dtype}, "
                f"its sidecar wants {want[1]} of {want[0]}"
            )
        # a plain view of the map is quicker to index
        self._array, self._offset = np.asarray(array), array.offset
        return self._array

    def begin(self) -> None:
        """Makes room for all rows, then the sidecar, without which that file counts for nothing."""
        with self.file(".npy").open("wb") as file:
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, self.dtype))
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (len(self.rows),)})
            file.truncate(file.tell() + len(self.rows) * self.dtype.itemsize)
            _to_disk(file)
        self._commit(self.record)

    def append(self, rows: np.ndarray) -> None:
        """Writes rows behind those that count, then counts them."""
        # not through the map, which would end the process where the disk is full
        with self.file(".npy").open("r+b", buffering=0) as file:
            file.seek(self._offset + self.filled * self.dtype.itemsize)
            left = memoryview(rows.tobytes())
            while left:
                left = left[file.write(left) :]
            _to_disk(file)
        self._commit({**self.record, "filled": self.filled + len(rows)})

    def _commit(self, record: dict[str, Any]) -> None:
        staged = self.file(".json.new")
        with staged.open("w") as file:
            file.write(json.dumps(record, indent=2) + "\n")
            file.flush()
            _to_disk(file)
        staged.replace(self.file(".json"))
        self.record = record

    def __getstate__(self) -> dict[str, Any]:
        # a map would be pickled as all of its rows
        return {**self.__dict__, "_array": None}


def find_parts(folder: Path) -> list[Part]:
    """All parts that a folder holds, in order; raises a `ValueError` if they are of two stores."""
    found = [path for path in folder.glob("part-*.json") if _SIDECAR.fullmatch(path.name)]
    parts = [Part.read(path) for path in sorted(found)]
    worlds = sorted({part.record["part"][1] for part in parts})
    if len(worlds) > 1:
        raise ValueError(f"{folder} holds parts of {worlds[0]} and of {worlds[1]}: two stores")
    return parts


def lock(part: Part) -> Any:
    """An open file that locks this part; the system unlocks it when the process ends.

    Raises:
        ValueError: If it is locked.
    """
    import fcntl

    file = part.file(".lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ValueError(
            f"{part.file('')} is being written already; processes that write together take "
            "a part=(rank, world_size) each"
        ) from error
    return file


def _to_disk(file: Any) -> None:
    os.fsync(file.fileno())
