"""How long steps take, and how much of that is waiting for pictures."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Measures steps, but not what lies between `lap` and `resume`."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        self.resume()

    def resume(self) -> None:
        """A step begins."""
        self.began = time.perf_counter()

    def lap(self) -> None:
        """A step ends."""
        self.steps += 1
        self.seconds += time.perf_counter() - self.began

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Within it, somebody waits for pictures."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def read(self, batch: int) -> dict[str, float]:
        """Seconds a step, those of them waiting for pictures, and pictures a second, since last."""
        found = {
            "step": self.seconds / self.steps,
            "data": self.waited / self.steps,
            "images": batch * self.steps / self.seconds,
        }
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0
        return found
