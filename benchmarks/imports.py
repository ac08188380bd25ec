"""What `import xq` costs beyond `import torch`, in fresh interpreters."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from matplotlib.figure import Figure

from benchmarks import harness, peers, pictures, terminal
from benchmarks.asked import Within
from benchmarks.cases import XQ, Case, Contender, Red, Spec
from benchmarks.memory import ROOT
from benchmarks.timing import Times, interleaved

WORK = "import after torch"
ROUNDS = 7
TOP = 5
MODULES = {XQ: "xq", peers.VQP: "vector_quantize_pytorch"}
# what users may not have: the core must not import it
OPTIONAL = ("faiss", "matplotlib", "timm", "lpips", "open_clip", "peft", "huggingface_hub")

_TIMED = """
import time
import torch
begun = time.perf_counter()
import {module}
print(time.perf_counter() - begun)
"""
_LISTED = (
    "import sys, torch; before = set(sys.modules); import xq; print(*set(sys.modules) - before)"
)


def seconds(module: str) -> float:
    """Of an import in a fresh interpreter that has imported torch."""
    return float(_python("-c", _TIMED.format(module=module)).stdout)


def own_modules() -> list[tuple[str, float]]:
    """What `import xq` adds to the modules of torch, each with its own seconds, in order."""
    report = _python("-X", "importtime", "-c", "import torch, xq").stderr
    rows = re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", report, re.M)
    # a module is listed as it is done, so all that torch needs stand above it
    after = [name for _, name in rows].index("torch") + 1
    return [(name, int(microseconds) / 1e6) for microseconds, name in rows[after:]]


def check(modules: list[tuple[str, float]]) -> None:
    """The gate: the core imports no optional package.

    Raises:
        Red: If it does.
    """
    extra = sorted({name.partition(".")[0] for name, _ in modules} & set(OPTIONAL))
    if extra:
        raise Red(f"import xq imports {', '.join(extra)}, which users may not have")


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    # an installed library has its bytecode; a checkout gets it from the first start
    own = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0, or 1 if the gate is red; then nothing is written."""
    # no device takes part
    options = replace(harness.parsed(BENCHMARK, arguments), device="cpu")
    document = harness.opened(BENCHMARK, options)
    print(terminal.header(document))
    modules = own_modules()
    try:
        check(modules)
    except Red as red:
        print(f"\nRED, no numbers: {red}", file=sys.stderr)
        return 1
    here = {name: module for name, module in MODULES.items() if find_spec(module)}
    samplers = {name: lambda module=module: seconds(module) for name, module in here.items()}
    if not options.quick:
        # the first start reads files that later ones find in memory
        for sample in samplers.values():
            sample()
    rounds = 1 if options.quick else ROUNDS
    taken = interleaved(samplers, [rounds] * len(samplers))
    case = Case(lambda _: {}, skipped={n: "not installed" for n in MODULES if n not in here})
    case.contenders = [Contender(name, samplers[name], name == XQ) for name in here]
    times = {name: Times(values) for name, values in taken.items()}
    spec = Spec(WORK, lambda: case, {}, {})
    document["cases"] = [harness.summary(spec, case, {}, times, dict.fromkeys(here), None)]
    dearest = sorted(modules, key=lambda row: -row[1])[:TOP]
    document["costliest"] = [{"module": name, "seconds": own} for name, own in dearest]
    print(terminal.case(document["cases"][0]))
    print(f"\nThe {TOP} modules that cost most, by themselves:")
    for row in document["costliest"]:
        print(f"  {row['module']:<40}{1000 * row['seconds']:>8.1f} ms")
    harness.closed(BENCHMARK, document, options)
    return 0


def draw(document: dict[str, Any]) -> Figure:
    """A bar for each library."""
    return pictures.bars(document)


BENCHMARK = harness.Benchmark(
    "imports",
    "Imports: what a library adds to `import torch`",
    lambda device, quick: [],
    {"cpu": [Within(WORK, 0.1)]},
    draw,
)


if __name__ == "__main__":
    sys.exit(main())
