"""Extra memory of one call: how far it rises above its inputs at the worst moment.

On CUDA torch's own counter tells. Its CPU allocator has none, and what a library keeps for its next
call would hide from one that only watches a later call. So on the CPU the first full call of a
fresh process is watched, through the kernel's high-water mark of resident memory (Linux). Before
it, the process has done the same work at a tiny size, which starts its threads and imports what
is imported late. Whatever is allocated counts: temporaries, results, gradients, buffers kept.
"""

import ctypes
import gc
import importlib
import os
import pickle
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Spec

ROOT = Path(__file__).parents[1]
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_HIGH_WATER_MARK = "5"
_PRELOADED = ("faiss", "vector_quantize_pytorch")
# no contender may take more on a CPU, whatever is free: other people use the machine too
_MOST = 4 << 30


def room(device: str) -> int:
    """Bytes that a contender may take; one that needs more is skipped."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] * 0.75)
    try:
        return min(_field(Path("/proc/meminfo"), "MemAvailable") // 2, _MOST)
    except OSError:
        return _MOST


def cuda_peak(run: Callable[[], Any]) -> int:
    """Extra bytes of a call on CUDA."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident_peak(run: Callable[[], Any]) -> int | None:
    """How far this process's resident memory rises during a call; None if nobody tells."""
    gc.collect()
    _return_free_memory()
    try:
        _CLEAR.write_text(_RESET_HIGH_WATER_MARK)
    except OSError:
        return None
    before = _field(_STATUS, "VmRSS")
    result = run()
    peak = _field(_STATUS, "VmHWM") - before
    del result
    return max(peak, 0)


class FreshProcesses:
    """Measures each contender in a process of its own.

    They are forks of one that has imported everything and started no thread yet, so that they
    start at once.
    """

    def __init__(self) -> None:
        self._server: subprocess.Popen[bytes] | None = None

    def peak(self, spec: Spec, name: str) -> int | None:
        """Extra bytes of the first full call of the contender `name`."""
        if self._server is None:
            self._server = _started()
        assert self._server.stdin
        assert self._server.stdout
        pickle.dump((spec, name, torch.get_num_threads()), self._server.stdin)
        self._server.stdin.flush()
        answer = self._server.stdout.readline().strip()
        return int(answer) if answer.isdigit() else None

    def close(self) -> None:
        """Ends the process that the others are forked from."""
        if self._server is not None:
            self._server.communicate()
            self._server = None


def _started() -> subprocess.Popen[bytes]:
    # Python 3.12 warns of forks beside threads: these are OpenBLAS's, which expects forks
    warnings = ("-W", "ignore::DeprecationWarning")
    command = [sys.executable, *warnings, "-c", "from benchmarks.memory import serve; serve()"]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def serve() -> None:
    """Answers the requests of `FreshProcesses`, until there are no more."""
    for module in _PRELOADED:
        if find_spec(module):
            importlib.import_module(module)
    # a word that a library prints must not pass for an answer
    answers = os.dup(1)
    os.dup2(2, 1)
    while True:
        try:
            # imports the module that makes the case
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            # at once: nothing is left to tidy up
            os._exit(0)
        # collecting in a fork would copy every page that holds an object
        gc.freeze()
        child = os.fork()
        if child == 0:
            _answer(answers, *request)
        _, status = os.waitpid(child, 0)
        if status != 0:
            os.write(answers, b"failed\n")


def _answer(answers: int, spec: Spec, name: str, threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        spec.make(device="cpu", **{**spec.sizes, **spec.tiny}).contender(name).run()
        peak = resident_peak(spec.make(device="cpu", **spec.sizes).contender(name).run)
        os.write(answers, f"{peak}\n".encode())
        os._exit(0)
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(1)


def _field(path: Path, field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", path.read_text(), re.M)
    assert found, f"no {field} in {path}"
    return int(found[1]) * 1024


def _return_free_memory() -> None:
    """Otherwise a call could fill what was freed before it, and nothing would be seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
