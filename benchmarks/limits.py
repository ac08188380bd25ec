"""What the machine can do: the fastest product in cache, and one pass over memory.

Both are timed in the rounds of the contenders, and the best of all rounds counts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.timing import Times, seconds_a_call

# sides of the blocks that are multiplied on a CPU; three of them should fit a core's own cache
_BLOCKS = (128, 192, 256, 320)
_CUDA_SIDE = 8192
# floats that are copied: too many for any cache
_STREAM = {"cpu": 1 << 24, "cuda": 1 << 28}
_QUICK_SIDE, _QUICK_STREAM = 64, 1 << 20
PRODUCT, COPY = "(product)", "(copy)"


@dataclass(frozen=True)
class Limits:
    """Measured rates.

    Attributes:
        flops: Float32 operations a second in the fastest matrix product: on a CPU of blocks that
            stay in cache, one a thread; on CUDA of large matrices, TF32 off.
        bandwidth: Bytes a second of a large copy, read and written.
    """

    flops: float
    bandwidth: float

    def seconds(self, flops: float, size: float) -> tuple[float, str]:
        """The least time for so much work, and which of the two bounds it."""
        product, stream = flops / self.flops, size / self.bandwidth
        return (product, "product") if product >= stream else (stream, "memory")


class Yardsticks:
    """A product and a copy, to be timed beside the contenders.

    Args:
        device: "cpu" or "cuda".
        quick: Whether any size will do.
    """

    def __init__(self, device: str, *, quick: bool = False) -> None:
        if quick:
            self._product = _Product(_QUICK_SIDE, device)
        elif device == "cuda":
            self._product = _Product(_CUDA_SIDE, device)
        else:
            self._product = max((_Product(side, device) for side in _BLOCKS), key=_rate)
        stream = _QUICK_STREAM if quick else _STREAM[device]
        self._source = torch.randn(stream, device=device)
        self._target = torch.empty_like(self._source)
        self._flops = self._bandwidth = 0.0

    def runs(self) -> dict[str, Callable[[], object]]:
        """What to time."""
        return {PRODUCT: self._product, COPY: lambda: self._target.copy_(self._source)}

    def limits(self, times: dict[str, Times]) -> Limits:
        """The best rates since the start: what the machine does when nobody disturbs it."""
        size = 2 * self._source.numel() * self._source.element_size()
        self._flops = max(self._flops, self._product.flops / min(times[PRODUCT].seconds))
        self._bandwidth = max(self._bandwidth, size / min(times[COPY].seconds))
        return Limits(self._flops, self._bandwidth)


class _Product:
    """Square matrices times others, one pair a thread."""

    def __init__(self, side: int, device: str) -> None:
        count = torch.get_num_threads() if device == "cpu" else 1
        self._a, self._b = (torch.randn(count, side, side, device=device) for _ in range(2))
        self._out = torch.empty_like(self._a)
        self._times = max(int(1e9 / (2 * count * side**3)), 1)
        self.flops = 2.0 * self._times * count * side**3

    def __call__(self) -> None:
        for _ in range(self._times):
            torch.bmm(self._a, self._b, out=self._out)


def _rate(product: _Product) -> float:
    """The best of several tries, since others may use the machine too."""
    product()
    end, best = time.perf_counter() + 0.3, float("inf")
    while time.perf_counter() < end:
        best = min(best, seconds_a_call(product, 1, "cpu"))
    return product.flops / best
