"""Runs a function on several gloo processes; a hang is an error within a minute."""

import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

# a collective that waits longer fails; so does the whole run, should something else hang
COLLECTIVE_SECONDS, TOTAL_SECONDS = 20, 55


def run_on_processes(
    function: Callable[..., Any], *args: Any, world_size: int, folder: Path
) -> list[Any]:
    """Calls `function(rank, join, *args)` on each process; returns what each of them returned.

    Args:
        function: Importable from a test module. Before it calls `join()` it is alone, afterwards
            in a process group. What it returns are tensors, numbers, strings and containers.
        *args: Anything that pickles.
        world_size: How many processes.
        folder: An empty one, for the rendezvous and the results.

    Raises:
        TimeoutError: If one does not end.
    """
    # processes fork from one that has only imported, which spares each the seconds of importing
    set_forkserver_preload(["torch", "torch.distributed.fsdp", "xq", "pytest"])
    spawned: Any = start_processes(
        _work,
        (function, args, world_size, folder),
        nprocs=world_size,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + TOTAL_SECONDS
    try:
        while not spawned.join(timeout=1):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__} hangs on {world_size} processes")
    finally:
        for process in spawned.processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def _work(
    rank: int, function: Callable[..., Any], args: tuple[Any, ...], world_size: int, folder: Path
) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    join = partial(
        dist.init_process_group,
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )
    torch.save(function(rank, join, *args), folder / f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
