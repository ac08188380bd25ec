"""Which number of threads and which precision are fastest here: measured, since it varies much."""

import os
import time
from collections.abc import Callable

import torch

# so much slower than in the trial, other programs must have come or gone
_SLOWER = 2.0


class Speed:
    """Tries a training step on the CPU in several ways, and uses the fastest.

    Small convolutions gain little from many threads, lose much where other programs are busy, and
    only some processors are quick in bfloat16.

    Args:
        step: A forward and backward pass, in bfloat16 autocast if its argument says so.
        threads: Use this many, and try no other number.
        bf16: Whether to use bfloat16; both are tried by default.
    """

    def __init__(
        self, step: Callable[[bool], object], *, threads: int | None, bf16: bool | None
    ) -> None:
        self.step = step
        here = os.cpu_count() or 1
        counts = [threads] if threads else sorted({1, min(here, 4), here})
        precisions = [False, True] if bf16 is None else [bf16]
        self.ways = [(count, precision) for count in counts for precision in precisions]
        self.choose()

    def choose(self) -> None:
        """Sets torch's threads, and `bf16`."""
        trials = {way: self._seconds(*way) for way in self.ways} if len(self.ways) > 1 else {}
        self.threads, self.bf16 = min(trials, key=trials.__getitem__) if trials else self.ways[0]
        self.seconds = trials.get((self.threads, self.bf16), float("inf"))
        torch.set_num_threads(self.threads)

    def check(self, seconds: float) -> None:
        """Chooses again if steps have come to take much longer than when it chose.

        Args:
            seconds: What a step took lately.
        """
        if seconds > _SLOWER * self.seconds:
            self.choose()

    def _seconds(self, threads: int, bf16: bool) -> float:
        """The shorter of two runs, after one to warm up."""
        torch.set_num_threads(threads)
        self.step(bf16)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            self.step(bf16)
            times.append(time.perf_counter() - start)
        return min(times)
