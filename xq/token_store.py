"""A data set as tokens on disk."""

import bisect
import itertools
import operator
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from xq.signature import check_same, signature
from xq.store_part import Part, find_parts, lock

# the label of rows that were appended without one
_NO_LABEL = -1


class TokenStore(Dataset[tuple[Tensor, Any]]):
    """Tokens of a data set, a row a sample, in the smallest integers that hold them.

    `TokenStore(path)` reads: `store[i]` is `(tokens, label)`, int64, and a slice gives a batch, as
    `decode` takes it. It pickles, so a `DataLoader` may have workers. It has the rows that were
    there when it was opened.

    `TokenStore.create` writes. The folder holds a numpy file and a JSON sidecar for each part. The
    sidecar says which quantizer the tokens belong to and how many rows are there; it is replaced in
    one piece after they are on the disk. So a process may be killed at any moment: the next
    resumes at `store.filled`, and the files end as if nothing had happened.

    Args:
        path: The folder.
        quantizer: The `Quantizer` or `Wrapper` whose tokens these must be, if given.
        part: Opens one part alone, `(rank, world_size)`, complete or not.

    Raises:
        FileNotFoundError: If there is no store, or a part of it is missing.
        ValueError: If the quantizer is another one or a file is damaged; or if one of several parts
            is not complete, so that rows would not be where the data set has them.

    Examples:
        >>> quantizer = ResidualQuantizer(VQ(8, 256), multiscale=(1, 2, 4))
        >>> tokens = quantizer.encode(torch.randn(3, 4, 4, 8))
        >>> with TokenStore.create("my.tokens", quantizer, length=3) as store:
        ...     store.append(tokens, labels=[7, 1, 7])
        >>> TokenStore("my.tokens", quantizer)
        TokenStore('my.tokens', 3 of 3 rows, each (21,) uint8)
        >>> torch.equal(TokenStore("my.tokens")[0][0], tokens[0])
        True
    """

    # an open file, while this store may append
    _lock: Any = None

    def __init__(
        self,
        path: str | os.PathLike[str],
        quantizer: Any = None,
        *,
        part: tuple[int, int] | None = None,
    ) -> None:
        self.path = Path(path)
        self._parts = _chosen(self.path, find_parts(self.path), part)
        if quantizer is not None:
            there, here = self._parts[0].record["quantizer"], signature(quantizer)
            check_same(f"{self.path} holds tokens of another quantizer", there, here)
        self._starts = [0, *itertools.accumulate(one.filled for one in self._parts[:-1])]

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        quantizer: Any,
        grid: int | Sequence[int] | None = None,
        *,
        length: int,
        part: tuple[int, int] = (0, 1),
    ) -> "TokenStore":
        """Opens a store to append to: a new one, or one that is there, which resumes.

        Processes that write together take a part each, `(rank, world_size)`: the range
        `store.rows` of the data set. `store.rows[store.filled:]` remain to be appended, in this
        order. `TokenStore(path)` later reads all parts as one.

        Args:
            path: The folder.
            quantizer: The `Quantizer` or `Wrapper` that makes the tokens.
            grid: Tokens of a sample, a side or a shape such as `(16, 16)`; with `scales` they are
                known.
            length: Rows of the whole data set.
            part: Which part to write.

        Raises:
            ValueError: If the store that is there was made with other arguments, another process is
                writing this part, or an argument is out of range.
        """
        rank, world = part
        if not 0 <= rank < world or length < 0:
            raise ValueError(
                f"TokenStore needs part=(rank, world_size) with 0 <= rank < world_size, and a "
                f"length of 0 or more; got part={part}, length={length}"
            )
        signed = signature(quantizer)
        record = {
            "length": length,
            "token_shape": _token_shape(quantizer, grid),
            "dtype": np.min_scalar_type(quantizer.codebook_size - 1).name,
            "quantizer": signed,
        }
        folder, new = Path(path), Part.new(Path(path), {"part": [rank, world], **record})
        folder.mkdir(parents=True, exist_ok=True)
        for other in find_parts(folder):
            there = {**other.record, "world_size": other.record["part"][1]}
            check_same(f"{folder} is another store", there, {**record, "world_size": world})
        locked = lock(new)
        try:
            if not new.file(".json").exists():
                new.begin()
            store = cls(path, part=part)
        except BaseException:
            locked.close()
            raise
        store._lock = locked
        _WRITERS.add(store)
        return store

    @property
    def rows(self) -> range:
        """Rows of the data set that belong here."""
        return range(self._parts[0].rows.start, self._parts[-1].rows.stop)

    @property
    def filled(self) -> int:
        """How many of them are here, from the first on."""
        return sum(part.filled for part in self._parts)

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of one row's tokens."""
        return tuple(self._parts[0].record["token_shape"])

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens on disk."""
        return np.dtype(self._parts[0].record["dtype"])

    def __len__(self) -> int:
        return self.filled

    def __getitem__(self, index: Any) -> tuple[Tensor, Any]:
        """Tokens and label of a row, or of the rows of a slice."""
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            return self._read(np.arange(chosen.start, chosen.stop, chosen.step))
        place = range(len(self))[operator.index(index)]
        owner = bisect.bisect_right(self._starts, place) - 1
        row = self._parts[owner].array()[place - self._starts[owner]]
        return torch.from_numpy(np.array(row["tokens"], np.int64)), int(row["label"])

    def append(self, tokens: Any, labels: Any = None) -> None:
        """Adds rows; when it returns they are on the disk. It waits for that, so append batches.

        Args:
            tokens: Indices `(n, *token_shape)` as `encode` returns them, a tensor or an array.
            labels: n integers; -1 for each if there are none.

        Raises:
            ValueError: If the store is open for reading or has no room, or if tokens or labels have
                another shape, are no integers or are out of range. Nothing is written then.
        """
        part = self._parts[0]
        if self._lock is None:
            raise ValueError(
                f"{self.path} is open for reading; TokenStore.create with the arguments that made "
                "it opens it to append"
            )
        rows = _as_rows(part, tokens, labels)
        room = len(part.rows) - part.filled
        if len(rows) > room:
            raise ValueError(
                f"{self.path} has room for {room} more of its {len(part.rows)} rows, got "
                f"{len(rows)}; after a restart, continue with store.rows[store.filled:]"
            )
        part.append(rows)

    def close(self) -> None:
        """Ends the writing, not the reading; the end of the process does so too."""
        if self._lock is not None:
            self._lock.close()
        self._lock = None

    def __enter__(self) -> "TokenStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # copies only read
        return {**self.__dict__, "_lock": None}

    def __repr__(self) -> str:
        return (
            f"TokenStore({str(self.path)!r}, {self.filled} of {len(self.rows)} rows, "
            f"each {self.token_shape} {self.dtype})"
        )

    def _read(self, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens and labels of the rows at these places."""
        found = np.empty(len(places), self._parts[0].dtype)
        owners = np.searchsorted(self._starts, places, side="right") - 1
        for owner in np.unique(owners):
            mine = owners == owner
            found[mine] = self._parts[owner].array()[places[mine] - self._starts[owner]]
        tokens, labels = (found[name].astype(np.int64) for name in ("tokens", "label"))
        return torch.from_numpy(tokens), torch.from_numpy(labels)


# stores that this process appends to
_WRITERS: "weakref.WeakSet[TokenStore]" = weakref.WeakSet()


def _close_all() -> None:
    for store in list(_WRITERS):
        store.close()


if hasattr(os, "register_at_fork"):
    # the workers of a DataLoader would hold its parent's locks beyond the parent's death
    os.register_at_fork(after_in_child=_close_all)


def _chosen(folder: Path, parts: list[Part], part: tuple[int, int] | None) -> list[Part]:
    """One part, or all, which must be there and complete if they are several."""
    if not parts:
        raise FileNotFoundError(f"{folder} is no token store; TokenStore.create makes one")
    if part is not None:
        for one in parts:
            if one.record["part"] == list(part):
                return [one]
    world = parts[0].record["part"][1]
    if part is not None or len(parts) < world:
        names = ", ".join(str(tuple(one.record["part"])) for one in parts)
        raise FileNotFoundError(
            f"{folder} lacks {'some of its parts' if part is None else f'part {part}'}; "
            f"it has {names}"
        )
    for one in parts[1:]:
        there, here = (dict(p.record, part=None, filled=None) for p in (one, parts[0]))
        check_same(f"{folder} has parts that differ", there, here)
    for one in parts if world > 1 else ():
        if one.filled < len(one.rows):
            raise ValueError(
                f"{one.file('')} has {one.filled} of its {len(one.rows)} rows, so that later rows "
                f"would not be where the data set has them; complete it, or open parts one by one "
                f"with part={tuple(one.record['part'])}"
            )
    return parts


def _token_shape(quantizer: Any, grid: int | Sequence[int] | None) -> list[int]:
    name = type(quantizer).__name__
    if quantizer.scales:
        if grid is not None:
            raise ValueError(f"{name} has scales, which say how many tokens; leave out grid={grid}")
        return [quantizer.num_tokens, *quantizer.code_shape]
    if grid is None:
        raise ValueError(f"{name} makes as many tokens as its input has; say grid=(height, width)")
    axes = (grid, grid) if isinstance(grid, int) else tuple(grid)
    if any(size < 1 for size in axes):
        raise ValueError(f"TokenStore needs a grid of positive sizes, got {grid}")
    return [*axes, *quantizer.code_shape]


def _as_rows(part: Part, tokens: Any, labels: Any) -> np.ndarray:
    """Tokens and labels side by side, checked."""
    shape, size = tuple(part.record["token_shape"]), part.record["quantizer"]["codebook_size"]
    tokens = _as_integers("tokens", part, tokens)
    if tokens.ndim != len(shape) + 1 or tokens.shape[1:] != shape:
        want = ", ".join(["n", *map(str, shape)])
        raise ValueError(f"{part.folder} takes tokens of shape ({want}), got {tokens.shape}")
    if tokens.size and (tokens.min() < 0 or tokens.max() >= size):
        raise ValueError(
            f"{part.folder} takes tokens in 0..{size - 1}, got {tokens.min()}..{tokens.max()}; "
            "were they made by a quantizer of another size?"
        )
    rows = np.empty(len(tokens), part.dtype)
    rows["tokens"], rows["label"] = tokens, _NO_LABEL
    if labels is not None:
        labels = _as_integers("labels", part, labels)
        if labels.shape != (len(rows),):
            raise ValueError(
                f"{part.folder} takes a label for each of {len(rows)} rows, got shape "
                f"{labels.shape}"
            )
        rows["label"] = labels
    return rows


def _as_integers(name: str, part: Part, values: Any) -> np.ndarray:
    values = values if isinstance(values, Tensor) else np.asarray(values)
    # an empty list is one of floats
    if "int" not in str(values.dtype) and len(values):
        raise ValueError(f"{part.folder} takes integer {name}, got {values.dtype}")
    return values.cpu().numpy() if isinstance(values, Tensor) else values
