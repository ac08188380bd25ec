"""Squared error and used codes of trained quantizers at equal bits, beside faiss and vqp."""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log2, prod
from statistics import fmean, median
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import harness, pictures, terminal
from benchmarks.asked import Asked, contender
from benchmarks.cases import XQ, Red, Skip
from benchmarks.coders import (
    BEAM,
    FAISS,
    Coder,
    Plan,
    Trainer,
    averaged,
    behind_linear,
    faiss_codes,
    faiss_kmeans,
    ours,
    vqp_averaged,
)
from benchmarks.patches import DIM, Patches, patches
from benchmarks.peers import VQP, vqp
from benchmarks.words import time as duration
from xq.quantizers import BSQ, FSQ, LFQ, ProductQuantizer, ResidualQuantizer

TRAIN, TEST = 200_000, 50_000
QUICK_TRAIN, QUICK_TEST = 4096, 1024
EPOCHS, ROUNDS = 5, 3
# a part of a residual or product
BYTE = 256
BITS, LEVELS = 12, (8, 8, 8, 8)
# vectors coded at a time: vqp makes several matrices of this many rows and a column a code
_BLOCK = 2048


@dataclass(frozen=True)
class Work:
    """Several ways to code a vector in the same number of bits.

    Attributes:
        name: As the tables show it.
        bits: A vector.
        trainers: By contender, in order; what is called may raise `Skip`.
        rounds: How often to train each, with a seed of its own.
    """

    name: str
    bits: float
    trainers: dict[str, Callable[[], Trainer]]
    rounds: int


def vq_work(codebook_size: int, plan: Plan, rounds: int = ROUNDS) -> Work:
    """One codebook, beside k-means."""
    trainers = {
        XQ: lambda: ours(partial(averaged, DIM, codebook_size), plan),
        FAISS: lambda: faiss_kmeans(codebook_size),
        VQP: lambda: vqp_averaged("VectorQuantize", plan, codebook_size=codebook_size),
    }
    return Work(_vq_name(codebook_size), log2(codebook_size), trainers, rounds)


def rq_work(depth: int, plan: Plan, rounds: int = ROUNDS) -> Work:
    """A sum of codes, found greedily and by beam search."""
    sizes = {"num_quantizers": depth, "codebook_size": BYTE}
    trainers = {
        XQ: lambda: ours(lambda: ResidualQuantizer(averaged(DIM, BYTE), depth), plan),
        FAISS: lambda: faiss_codes("ResidualQuantizer", depth),
        FAISS + BEAM: lambda: faiss_codes("ResidualQuantizer", depth, beam=True),
        VQP: lambda: vqp_averaged("ResidualVQ", plan, **sizes),
    }
    return Work(_rq_name(depth), depth * log2(BYTE), trainers, rounds)


def pq_work(parts: int, plan: Plan, rounds: int = ROUNDS) -> Work:
    """A code for each part of the channels."""
    sizes = {"num_quantizers": 1, "groups": parts, "codebook_size": BYTE}
    trainers = {
        XQ: lambda: ours(lambda: ProductQuantizer(averaged(DIM // parts, BYTE), P=parts), plan),
        FAISS: lambda: faiss_codes("ProductQuantizer", parts),
        VQP: lambda: vqp_averaged("GroupedResidualVQ", plan, **sizes),
    }
    return Work(_pq_name(parts), parts * log2(BYTE), trainers, rounds)


def linear_works(plan: Plan, rounds: int = ROUNDS) -> list[Work]:
    """Quantizers that have no codebook, between two linear maps."""
    pairs = {
        _FSQ: (lambda: FSQ(LEVELS), lambda: vqp().FSQ(list(LEVELS))),
        _LFQ: (
            lambda: LFQ(BITS, regularize=False),
            lambda: vqp().LFQ(dim=BITS, entropy_loss_weight=0.0, commitment_loss_weight=0.25),
        ),
        _BSQ: (
            lambda: BSQ(BITS, regularize=False),
            lambda: vqp().LFQ(
                dim=BITS, spherical=True, entropy_loss_weight=0.0, commitment_loss_weight=0.25
            ),
        ),
    }
    works = []
    for name, (mine, theirs) in pairs.items():
        trainers = {
            XQ: partial(behind_linear, XQ, mine, plan),
            VQP: partial(behind_linear, VQP, theirs, plan),
        }
        bits = log2(prod(LEVELS)) if name == _FSQ else BITS
        works.append(Work(name, bits, trainers, rounds))
    return works


def _vq_name(codebook_size: int) -> str:
    return f"VQ {codebook_size}"


def _rq_name(depth: int) -> str:
    return f"RQ {depth} x {BYTE}"


def _pq_name(parts: int) -> str:
    return f"PQ {parts} x {BYTE}"


_FSQ = f"FSQ {' x '.join(map(str, LEVELS))}, linear maps"
_LFQ, _BSQ = (f"{name} {BITS} bits, linear maps" for name in ("LFQ", "BSQ"))


def works(quick: bool) -> list[Work]:
    """All that is compared, from few bits to many."""
    if quick:
        plan = Plan(batch=512, epochs=1)
        return [
            vq_work(16, plan, 1),
            rq_work(2, plan, 1),
            pq_work(2, plan, 1),
            *linear_works(plan, 1),
        ]
    plan = Plan(batch=1024, epochs=EPOCHS)
    large = Plan(batch=4096, epochs=EPOCHS)
    return [
        vq_work(256, plan),
        vq_work(1024, large),
        vq_work(4096, replace(large, revive=0.1), 1),
        *linear_works(plan),
        pq_work(4, plan),
        rq_work(4, plan),
        pq_work(8, plan),
        rq_work(8, plan, 1),
    ]


def measured(work: Work, data: Patches) -> dict[str, Any]:
    """One case as JSON: contenders in turn, in another order each round.

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
    for seed in range(work.rounds):
        turn = seed % len(names)
        for name in names[turn:] + names[:turn]:
            for coder, numbers in _run(trainers[name], data, seed):
                runs.setdefault(coder.name, []).append(numbers)
    ordered = sorted(runs, key=lambda name: (not name.startswith(XQ), len(name), name))
    contenders = [_summary(name, runs[name]) for name in ordered]
    peers = [c for c in contenders if not c["ours"]]
    return {
        "name": work.name,
        "bits": work.bits,
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


@dataclass(frozen=True)
class Error(Asked):
    """At most so many times the squared error of `against`."""

    more_is_better: ClassVar[bool] = False

    @property
    def wanted(self) -> str:
        return f"error x {self.bound:g}"

    def value(self, case: dict[str, Any], ours: dict[str, Any]) -> float | None:
        peer = contender(case, self.against)
        return None if peer is None else ours["mse"] / peer["mse"]

    def words(self, value: float) -> str:
        return f"x {value:.3f}"


@dataclass(frozen=True)
class Sooner(Asked):
    """Trained in at most so many times the CPU seconds of `against`."""

    more_is_better: ClassVar[bool] = False

    @property
    def wanted(self) -> str:
        return f"training x {self.bound:g}"

    def value(self, case: dict[str, Any], ours: dict[str, Any]) -> float | None:
        peer = contender(case, self.against)
        return None if peer is None else ours["cpu_seconds"] / peer["cpu_seconds"]

    def words(self, value: float) -> str:
        return f"x {value:.2f}"


@dataclass(frozen=True)
class Used(Asked):
    """At least this share of the codes is chosen by some training vector."""

    against: str = "used share"

    @property
    def wanted(self) -> str:
        return _used(self.bound)

    def value(self, case: dict[str, Any], ours: dict[str, Any]) -> float | None:
        return ours["used_train"]

    def words(self, value: float) -> str:
        return _used(value)


ASKED: list[Asked] = [
    *(
        line
        for codebook_size, bound in ((256, 1.02), (1024, 1.02), (4096, 1.03))
        for line in (
            Error(_vq_name(codebook_size), bound, FAISS),
            Used(_vq_name(codebook_size), 0.999),
        )
    ),
    *(Error(_pq_name(parts), 1.02, FAISS) for parts in (4, 8)),
    *(
        line
        for depth in (4, 8)
        for line in (
            Error(_rq_name(depth), 1.0, FAISS),
            Error(_rq_name(depth), 1.0, FAISS + BEAM, XQ + BEAM),
            Error(_rq_name(depth), 0.88, XQ, XQ + BEAM),
        )
    ),
    Error(None, 1.0, VQP),
    Sooner(None, 1.0, FAISS),
]


def table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """A row a case, a column a contender."""
    cases = document["cases"]
    names = list(dict.fromkeys(c["name"] for case in cases for c in case["contenders"]))
    rows = []
    for case in cases:
        cells = {c["name"]: _cell(c) for c in case["contenders"]}
        cells |= dict.fromkeys(case["skipped"], "left out")
        rows.append([case["name"], f"{case['bits']:g}", *(cells.get(n, "") for n in names)])
    return ["error x 1000, used share, training", "bits", *names], rows


def _cell(c: dict[str, Any]) -> str:
    # what only codes in another way was not trained again
    took = "" if c["used_train"] is None and c["ours"] else duration(c["cpu_seconds"])
    return "<br>".join(filter(None, (_error(c["mse"]), _used(c["used_test"]), took)))


def _error(mse: float) -> str:
    return f"{1000 * mse:.4g}"


def _used(part: float | None) -> str:
    return "" if part is None else f"{100 * part:.1f} %"


def block(case: dict[str, Any]) -> str:
    """One case for the terminal, a line a contender."""
    head = ("error x 1000", "x xq", "used", "of train", "training", "coding")
    lines = ["", f"{case['name']}   {case['bits']:g} bits"]
    lines.append(f"{'':18}" + "".join(f"{name:>13}" for name in head))
    lead = case["contenders"][0]["mse"]
    for c in case["contenders"]:
        cells = (
            _error(c["mse"]),
            f"{c['mse'] / lead:.3f}",
            _used(c["used_test"]),
            _used(c["used_train"]),
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
            document["cases"].append(measured(work, data))
            print(block(document["cases"][-1]), flush=True)
    except Red as red:
        print(f"\nRED, no numbers: {red}", file=sys.stderr)
        return 1
    harness.closed(BENCHMARK, document, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
