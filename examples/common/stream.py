"""Batches as a function of the step alone: what was killed goes on as if it had not been."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.adm import BrokenPicture, read_crop
from common.sources import Source

# pictures tried in place of a broken one
_TRIES = 20


class Order:
    """Which picture stands at a position: an epoch after the other, each in an order of its own.

    Groups (shards) are shuffled, then the pictures within each window of some groups.

    Args:
        sizes: Pictures of each group.
        window: Groups whose pictures are shuffled together.
        seed: Of all orders.
    """

    def __init__(self, sizes: Sequence[int] | np.ndarray, window: int, seed: int) -> None:
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.length, self.window, self.seed = int(self.sizes.sum()), window, seed
        self._known: tuple[Any, ...] = (None,)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.length)
        key, first, last, rows = self._known if self._known[0] == epoch else (None, 0, 0, None)
        if key is None or not first <= place < last:
            first, last, rows = self._window(epoch, place)
            self._known = (epoch, first, last, rows)
        return int(rows[place - first])  # pyright: ignore[reportOptionalSubscript]

    def _window(self, epoch: int, place: int) -> tuple[int, int, np.ndarray]:
        """The window around a place: where it begins and ends, and its pictures in order."""
        groups = np.random.default_rng((self.seed, epoch)).permutation(len(self.sizes))
        ends = np.cumsum(self.sizes[groups])
        number = int(np.searchsorted(ends, place, side="right")) // self.window
        low, high = number * self.window, min((number + 1) * self.window, len(groups))
        first, last = (int(ends[low - 1]) if low else 0), int(ends[high - 1])
        parts = [self.starts[g] + np.arange(self.sizes[g]) for g in groups[low:high]]
        random = np.random.default_rng((self.seed, epoch, number))
        return first, last, random.permutation(np.concatenate(parts))


class Crops(Dataset[tuple[Tensor, str]]):
    """Random crops by position, each with draws of its own; or middles, in the source's order.

    Args:
        source: Where pictures are.
        rows: Which of them; a range is all.
        data: The settings.
        seed: Of order and crops; None for middles.
    """

    def __init__(self, source: Source, rows: range | np.ndarray, data: Any, seed: int | None):
        self.source, self.rows, self.data, self.seed = source, rows, data, seed
        groups = source.groups if isinstance(rows, range) else source.groups[rows]
        self.order = Order(np.bincount(np.asarray(groups)), data.window, seed or 0)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[Tensor, str]:
        """A crop, and what was skipped for it."""
        skipped = []
        for attempt in range(_TRIES):
            try:
                return self._crop(position + attempt), "\n".join(skipped)
            except BrokenPicture as error:
                if self.data.broken != "skip":
                    raise BrokenPicture(
                        f"{error}; repair or remove it, or pass --data.broken skip"
                    ) from error
                skipped.append(str(error))
        raise BrokenPicture(f"{_TRIES} pictures in a row cannot be read, the last: {skipped[-1]}")

    def _crop(self, position: int) -> Tensor:
        sizes = (self.data.size, self.data.channels)
        if self.seed is None:
            file, name = self.source.open(int(self.rows[position % len(self)]))
            return read_crop(file, name, *sizes)
        file, name = self.source.open(int(self.rows[self.order[position]]))
        random = np.random.default_rng((self.seed, 1, position))
        return read_crop(file, name, *sizes, random, self.data.flip, self.data.zoom)


class _Positions:
    """The positions of this process's micro-batches, one after the other."""

    def __init__(self, steps: range, data: Any, rank: int, world: int) -> None:
        self.steps, self.data, self.rank, self.world = steps, data, rank, world

    def __len__(self) -> int:
        return len(self.steps) * self.data.accumulate

    def __iter__(self) -> Iterator[range]:
        parts = self.world * self.data.accumulate
        length = self.data.batch // parts
        for step in self.steps:
            for micro in range(self.data.accumulate):
                first = step * self.data.batch + (micro * self.world + self.rank) * length
                yield range(first, first + length)


def check_batch(data: Any, world: int) -> None:
    """Refuses a batch that processes and micro-batches cannot share evenly.

    Raises:
        ValueError: If it is such.
    """
    parts = world * data.accumulate
    if data.batch < 1 or data.accumulate < 1 or data.batch % parts:
        near = max(data.batch // max(parts, 1), 1) * max(parts, 1)
        raise ValueError(
            f"data.batch = {data.batch} cannot be shared by {world} processes in {data.accumulate} "
            f"micro-batches each; {near} can"
        )


def training_batches(
    crops: Crops, steps: range, rank: int, world: int
) -> Iterator[tuple[Float[Tensor, "b c h w"], list[str]]]:
    """Micro-batches of these steps, and what was skipped in them."""
    data = crops.data
    return iter(_loader(crops, data, batch_sampler=_Positions(steps, data, rank, world)))


def held_out_batches(
    crops: Crops, batch: int, most: int, rank: int, world: int
) -> Iterator[tuple[Float[Tensor, "b c h w"], list[str]]]:
    """Every picture once, each on one process."""
    own = range(rank, min(len(crops), most), world)
    batches = [own[i : i + batch] for i in range(0, len(own), batch)]
    return iter(_loader(crops, crops.data, batch_sampler=batches))


def _loader(crops: Crops, data: Any, **options: Any) -> DataLoader[Any]:
    pinned = torch.cuda.is_available()
    return DataLoader(
        crops, num_workers=data.workers, collate_fn=_collate, pin_memory=pinned, **options
    )


def _collate(samples: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    images, skipped = zip(*samples, strict=True)
    return torch.stack(images), [text for text in skipped if text]
