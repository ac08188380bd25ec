"""How far a training has come, in steps or in time, and the learning rate that follows it."""

import math
import time


class Clock:
    """Counts steps and seconds until either is used up.

    Args:
        steps: To do, or None.
        seconds: To spend from now on, or None.
    """

    def __init__(self, steps: int | None = None, seconds: float | None = None) -> None:
        self.steps, self.seconds = steps, seconds
        self.step = 0
        self.started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.started

    def progress(self) -> float:
        """From 0 at the start to 1 at the end."""
        by_steps = self.step / self.steps if self.steps else 0.0
        by_time = self.elapsed / self.seconds if self.seconds else 0.0
        return min(max(by_steps, by_time), 1.0)


def learning_rate(peak: float, step: int, progress: float, warm_up: int = 50) -> float:
    """Linear up over the first steps, along a cosine down to zero at the end."""
    return peak * min((step + 1) / warm_up, 1.0) * (1 + math.cos(math.pi * progress)) / 2
