"""Runs a benchmark: gate, interleaved rounds, memory; then table, JSON and picture."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import machine, terminal
from benchmarks.asked import Asked, judged
from benchmarks.cases import XQ, Case, Red, Spec
from benchmarks.limits import Limits, Yardsticks
from benchmarks.memory import FreshProcesses, cuda_peak
from benchmarks.timing import LONG, Times, in_turn, time_all

RESULTS = Path(__file__).parent / "results"
# beside the page that shows them
PICTURES = Path(__file__).parents[1] / "docs" / "assets" / "benchmarks"


@dataclass(frozen=True)
class Benchmark:
    """One command.

    Attributes:
        name: Of the command and of its files.
        title: What is timed, in a few words.
        specs: `specs(device, quick)`, the cases in order.
        asked: By device.
        draw: Makes the picture of a document.
        table: The table of a document, head and rows, where it is not one of times and memory.
    """

    name: str
    title: str
    specs: Callable[[str, bool], list[Spec]]
    asked: dict[str, list[Asked]]
    draw: Callable[[dict[str, Any]], Figure]
    table: Callable[[dict[str, Any]], tuple[list[str], list[list[str]]]] | None = None


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    device: str
    quick: bool
    out: Path


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> int:
    """The command: 0, or 1 if the gate is red; then nothing is written."""
    options = parsed(benchmark, arguments)
    document = opened(benchmark, options)
    print(terminal.header(document), flush=True)
    yardsticks = Yardsticks(options.device, quick=options.quick)
    fresh = FreshProcesses() if options.device == "cpu" else None
    try:
        for spec in benchmark.specs(options.device, options.quick):
            case = measured(spec, yardsticks, options, fresh)
            document["cases"].append(case)
            print(terminal.case(case), flush=True)
    except Red as red:
        print(f"\nRED, no numbers: {red}", file=sys.stderr)
        return 1
    finally:
        if fresh:
            fresh.close()
    closed(benchmark, document, options)
    return 0


def parsed(benchmark: Benchmark, arguments: Sequence[str] | None) -> Options:
    """The options, with the threads already set."""
    return options(parser(benchmark).parse_args(arguments))


def parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark.name}", description=f"Measures {benchmark.title}."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: does it run?")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the JSON and the PNG; default: those of the page, with --quick a new one",
    )
    return parser


def options(given: argparse.Namespace) -> Options:
    """The options, with the threads already set."""
    if given.threads:
        torch.set_num_threads(given.threads)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.set_float32_matmul_precision("highest")
    # numbers that mean nothing must not take the place of results
    out = given.out or (Path(tempfile.mkdtemp()) if given.quick else RESULTS)
    return Options(device, given.quick, out)


def opened(benchmark: Benchmark, options: Options) -> dict[str, Any]:
    """The document that results go into."""
    return {
        "benchmark": benchmark.name,
        "title": benchmark.title,
        "device": options.device,
        "quick": options.quick,
        **machine.described(options.device),
        "cases": [],
        "asked": [],
    }


def closed(benchmark: Benchmark, document: dict[str, Any], options: Options) -> None:
    """Compares with what was asked, and writes both files."""
    asked = [] if options.quick else benchmark.asked.get(options.device, [])
    document["asked"] = [judged(line, document["cases"]) for line in asked]
    print(terminal.asked(document["asked"]))
    stem = benchmark.name + ("-cuda" if options.device == "cuda" else "")
    picture = pictures(options.out) / f"{stem}.png"
    for folder in (options.out, picture.parent):
        folder.mkdir(parents=True, exist_ok=True)
    figure = benchmark.draw(document)
    FigureCanvasAgg(figure)
    with replacing(picture) as path:
        figure.savefig(path, format="png", dpi=130)
    with replacing(options.out / f"{stem}.json") as path:
        path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{options.out / stem}.json\n{picture}")


def pictures(results: Path) -> Path:
    """Where the pictures of these results go: beside them, unless they are the page's."""
    return PICTURES if results.resolve() == RESULTS else results


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` once it is whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def measured(
    spec: Spec, yardsticks: Yardsticks, options: Options, fresh: FreshProcesses | None
) -> dict[str, Any]:
    """One case as JSON; the memory in fresh processes, or on CUDA in this one.

    Raises:
        Red: If a contender of ours is wrong.
    """
    case = spec.make(device=options.device, **spec.sizes)
    said, slow = gate(spec, case)
    if options.device == "cuda":
        # kernels are compiled in their first call
        slow = {}
    runs = {contender.name: contender.run for contender in case.contenders}
    timed = runs | yardsticks.runs()
    if options.quick:
        times = in_turn(timed, options.device, dict.fromkeys(timed, 1), [1] * len(timed))
    else:
        times = time_all(timed, options.device, spec.seconds, slow)
    peaks = {
        name: fresh.peak(spec, name) if fresh else cuda_peak(run) for name, run in runs.items()
    }
    # of networks nobody counted what they cannot do without
    rates = yardsticks.limits(times) if case.flops or case.bytes else None
    return summary(spec, case, said, times, peaks, rates)


def gate(spec: Spec, case: Case) -> tuple[dict[str, str], dict[str, float]]:
    """Runs every contender once and lets the case judge.

    Returns:
        What was found, and how long the slow ones took, which need not be tried out again.

    Raises:
        Red: If a contender of ours is wrong.
    """
    results, slow = {}, {}
    try:
        for contender in case.contenders:
            begun = time.perf_counter()
            results[contender.name] = contender.run()
            seconds = time.perf_counter() - begun
            if seconds > LONG:
                slow[contender.name] = seconds
        return case.check(results), slow
    except Red as red:
        raise Red(f"{spec.name}: {red}") from None


def summary(
    spec: Spec,
    case: Case,
    said: dict[str, str],
    times: dict[str, Times],
    peaks: dict[str, int | None],
    rates: Limits | None,
) -> dict[str, Any]:
    """The numbers of one case, and their ratios."""
    lead = times[XQ].median
    peers = [c.name for c in case.contenders if not c.ours]
    best = min(peers, key=lambda name: times[name].median, default=None)
    least, of = (None, None) if rates is None else rates.seconds(case.flops, case.bytes)
    return {
        "name": spec.name,
        "sizes": spec.sizes,
        "sweeps": list(spec.sweeps),
        "limit": None if rates is None else {"seconds": least, "of": of, **asdict(rates)},
        "best_peer": best,
        "ahead_of_best_peer": None if best is None else times[best].median / lead,
        "skipped": case.skipped,
        "contenders": [
            {
                "name": c.name,
                "ours": c.ours,
                "median": times[c.name].median,
                "spread": times[c.name].spread,
                "times_xq": times[c.name].median / lead,
                "of_limit": None if least is None else least / times[c.name].median,
                "peak_bytes": peaks[c.name],
                "checked": said.get(c.name, ""),
                "seconds": times[c.name].seconds,
                "calls": times[c.name].calls,
            }
            for c in case.contenders
        ],
    }
