"""Vectors against all codes, a block of vectors at a time, so that scores never pile up."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from xq.precision import float32_island

# scores in flight: 2 MiB of float32 stay in the caches of two cores; a GPU has more to fill
_SCORES, _SCORES_GPU = 1 << 19, 1 << 23


def block_length(codes: Tensor) -> int:
    """Vectors in a block whose scores for `codes` (one a row) are few enough."""
    scores = _SCORES if codes.device.type == "cpu" else _SCORES_GPU
    return max(scores // max(len(codes), 1), 1)


def exact(op: Callable[..., Any]) -> Callable[..., Any]:
    """Runs an op in full float32: its backward pass is outside the island of the root.

    It computes scores once more, which temperatures of 0.01 multiply by 100, errors too.
    """

    @wraps(op)
    def run(*args: Any) -> Any:
        with float32_island(args[0].device.type):
            return op(*args)

    return run
