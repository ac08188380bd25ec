"""Every test starts from seed 0, with deterministic kernels and poisoned memory."""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from processes import run_on_processes


@pytest.fixture(autouse=True)
def reproducible(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeds torch; on the CPU, `torch.empty` and its like are full of NaN."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    # some CUDA kernels (bicubic backward) have no deterministic form, and refuse
    on_gpu = request.node.get_closest_marker("gpu") is not None
    torch.use_deterministic_algorithms(not on_gpu)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def on_processes(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., list[Any]]:
    """`on_processes(function, *args, world_size=2)`: what `run_on_processes` does."""
    numbers = count()

    def run(function: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
        folder = tmp_path_factory.mktemp(f"processes-{next(numbers)}")
        return run_on_processes(function, *args, world_size=world_size, folder=folder)

    return run
