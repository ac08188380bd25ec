"""Squared error and used codes of trained quantizers at equal bits, beside faiss and vqp."""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from statistics import fmean, median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import harness, pictures, terminal
from benchmarks.cases import XQ, Red, Skip
from benchmarks.coders import Coder, Trainer
from benchmarks.distortion_asked import ASKED
from benchmarks.distortion_cases import Work, works
from benchmarks.patches import Patches, patches
from benchmarks.words import share, time as duration

TRAIN, TEST = 200_000, 50_000
QUICK_TRAIN, QUICK_TEST = 4096, 1024
# seeds, and how long a case may have taken for another one to begin
ROUNDS, SECONDS = 3, 20.0
# vectors coded at a time: vqp makes several matrices of this many rows and a column a code
_BLOCK = 2048


def measured(work: Work, data: Patches, rounds: int) -> dict[str, Any]:
    """One case as JSON: contenders in turn, in another order each round.

    Args:
        work: The case.
        data: What to train on, and to test on.
        rounds: Seeds, each of which trains everything anew; fewer where that takes long.

    Raises:
        Red: If a quantizer of ours gives other codes than its definition.
    """
    trainers, skipped = {}, {}
    for name, build in work.trainers.items():
        try:
            trainers[name] = build()
        except Skip as reason:
            skipped[name] = str(reason)
    names = list(trainers)
    runs: dict[str, list[dict[str, float | None]]] = {}
    begun = time.process_time()
    for seed in range(rounds):
        if time.process_time() - begun > SECONDS:
            break
        turn = seed % len(names)
        for name in names[turn:] + names[:turn]:
            for coder, numbers in _run(trainers[name], data, seed):
                runs.setdefault(coder.name, []).append(numbers)
    ordered = sorted(runs, key=lambda name: (not name.startswith(XQ), name))
    contenders = [_summary(name, runs[name]) for name in ordered]
    peers = [c for c in contenders if not c["ours"]]
    return {
        "name": work.name,
        "bits": work.bits,
        "batch": work.plan.batch,
        "epochs": work.plan.epochs,
        "skipped": skipped,
        "best_peer": min(peers, key=lambda c: c["mse"])["name"] if peers else None,
        "contenders": contenders,
    }


def _run(
    train: Trainer, data: Patches, seed: int
) -> Iterator[tuple[Coder, dict[str, float | None]]]:
    wall, cpu = time.perf_counter(), time.process_time()
    coders = train(data.train, seed)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    for coder in coders:
        begun = time.process_time()
        mse, used = _coded(coder, data.test)
        coding = time.process_time() - begun
        seen = None if coder.is_slow else _coded(coder, data.train)[1]
        yield (
            coder,
            {
                "mse": mse,
                "used_test": used,
                "used_train": seen,
                "wall_seconds": wall,
                "cpu_seconds": cpu,
                "coding_seconds": coding,
            },
        )


def _coded(coder: Coder, x: Tensor) -> tuple[float, float]:
    """Squared error a dimension, and the share of codes in use, the mean over parts."""
    error, counts = 0.0, torch.zeros(0)
    for block in x.split(_BLOCK):
        indices, decoded = coder.code(block)
        error += (decoded.double() - block.double()).square().sum().item()
        if not len(counts):
            counts = torch.zeros(indices.shape[1], coder.codes, dtype=torch.int64)
        counts.scatter_add_(1, indices.T.long(), torch.ones_like(indices.T, dtype=torch.int64))
    return error / x.numel(), (counts > 0).double().mean().item()


def _summary(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, the median of times."""
    alike = {key: [run[key] for run in runs] for key in runs[0]}
    numbers = {
        key: None if None in values else (median if key.endswith("seconds") else fmean)(values)
        for key, values in alike.items()
    }
    return {"name": name, "ours": name.startswith(XQ), **numbers, "runs": runs}


def table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row a case, a column a contender."""
    cases = document["cases"]
    names = list(dict.fromkeys(c["name"] for case in cases for c in case["contenders"]))
    rows = []
    for case in cases:
        cells = {c["name"]: _cell(c) for c in case["contenders"]}
        cells |= dict.fromkeys(case["skipped"], "left out")
        known = (case["name"], f"{case['bits']:g}", str(case["epochs"]))
        rows.append([*known, *(cells.get(n, "") for n in names)])
    return ["error x 1000, used, training", "bits", "epochs", *names], rows


def _cell(c: dict[str, Any]) -> str:
    # what only codes in another way was not trained again
    took = "" if c["used_train"] is None and c["ours"] else duration(c["cpu_seconds"])
    used = " / ".join(filter(None, (share(c["used_test"], 1), share(c["used_train"], 1))))
    return "<br>".join(filter(None, (_error(c["mse"]), used, took)))


def _error(mse: float) -> str:
    return f"{1000 * mse:.4g}"


def block(case: dict[str, Any]) -> str:
    """One case for the terminal, a line a contender."""
    head = ("error x 1000", "x xq", "used", "of train", "training", "coding")
    epochs = f"{case['epochs']} epoch{'s' if case['epochs'] > 1 else ''}"
    lines = ["", f"{case['name']}   {case['bits']:g} bits, {epochs}, batches of {case['batch']}"]
    lines.append(f"{'':18}" + "".join(f"{name:>13}" for name in head))
    lead = case["contenders"][0]["mse"]
    for c in case["contenders"]:
        cells = (
            _error(c["mse"]),
            f"{c['mse'] / lead:.3f}",
            share(c["used_test"], 1),
            share(c["used_train"], 1),
            duration(c["cpu_seconds"]),
            duration(c["coding_seconds"]),
        )
        lines.append(f"  {c['name']:<16}" + "".join(f"{cell:>13}" for cell in cells))
    lines += [f"  {name}: left out, {reason}" for name, reason in case["skipped"].items()]
    return "\n".join(lines)


def draw(document: dict[str, Any]) -> Figure:
    """Bars of the error and of the time to train."""
    fields = {
        "mse": pictures.Field("squared error x 1000", _error),
        "cpu_seconds": pictures.Field("training, CPU seconds", duration),
    }
    return pictures.bars(document, fields)


BENCHMARK = harness.Benchmark(
    "distortion",
    "Squared error of trained codes at equal bits, patches of photographs, float32",
    lambda device, quick: [],
    {"cpu": ASKED},
    draw,
    table,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0, or 1 if the gate is red; then nothing is written."""
    parser = harness.parser(BENCHMARK)
    parser.add_argument("--data", default="demo", help='"demo", or a folder of pictures')
    # so that seconds of the CPU compare
    parser.set_defaults(threads=1)
    given: Namespace = parser.parse_args(arguments)
    # faiss-cpu takes part
    given.device = "cpu"
    options = harness.options(given)
    sizes = (QUICK_TRAIN, QUICK_TEST) if options.quick else (TRAIN, TEST)
    try:
        data = patches(given.data, *sizes)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    document = harness.opened(BENCHMARK, options)
    document["data"] = {"words": data.words, "variance": data.variance}
    print(terminal.header(document))
    print(f"{data.words}; test variance x 1000: {_error(data.variance)}", flush=True)
    try:
        for work in works(options.quick):
            document["cases"].append(measured(work, data, 1 if options.quick else ROUNDS))
            print(block(document["cases"][-1]), flush=True)
    except Red as red:
        print(f"\nRED, no numbers: {red}", file=sys.stderr)
        return 1
    harness.closed(BENCHMARK, document, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
