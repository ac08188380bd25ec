"""Squared error and used codes of trained quantizers at equal bits, beside faiss and vqp."""

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
# seeds, and how long a case may have taken for another one to begin
ROUNDS, SECONDS = 3, 20.0
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
        plan: How those that learn by batches are trained.
        trainers: By contender, in order; what is called may raise `Skip`.
    """

    name: str
    bits: float
    plan: Plan
    trainers: dict[str, Callable[[], Trainer]]


def vq_work(codebook_size: int, plan: Plan) -> Work:
    """One codebook, beside k-means."""
    trainers = {
        XQ: lambda: ours(partial(averaged, DIM, codebook_size), plan),
        FAISS: lambda: faiss_kmeans(codebook_size),
        VQP: lambda: vqp_averaged("VectorQuantize", plan, codebook_size=codebook_size),
    }
    return Work(_vq_name(codebook_size), log2(codebook_size), plan, trainers)


def rq_work(depth: int, plan: Plan) -> Work:
    """A sum of codes, found greedily and by beam search."""
    sizes = {"num_quantizers": depth, "codebook_size": BYTE}
    trainers = {
        XQ: lambda: ours(lambda: ResidualQuantizer(averaged(DIM, BYTE), depth), plan),
        FAISS: lambda: faiss_codes("ResidualQuantizer", depth),
        FAISS + BEAM: lambda: faiss_codes("ResidualQuantizer", depth, beam=True),
        VQP: lambda: vqp_averaged("ResidualVQ", plan, **sizes),
    }
    return Work(_rq_name(depth), depth * log2(BYTE), plan, trainers)


def pq_work(parts: int, plan: Plan) -> Work:
    """A code for each part of the channels."""
    sizes = {"num_quantizers": 1, "groups": parts, "codebook_size": BYTE}
    trainers = {
        XQ: lambda: ours(lambda: ProductQuantizer(averaged(DIM // parts, BYTE), P=parts), plan),
        FAISS: lambda: faiss_codes("ProductQuantizer", parts),
        VQP: lambda: vqp_averaged("GroupedResidualVQ", plan, **sizes),
    }
    return Work(_pq_name(parts), parts * log2(BYTE), plan, trainers)


def linear_works(plan: Plan) -> list[Work]:
    """Quantizers that have no codebook, between two linear maps; for both the best settings."""
    signs = {"dim": BITS, "entropy_loss_weight": 0.0}
    fsq = _pair(
        plan,
        lambda: FSQ(LEVELS),
        lambda: vqp().FSQ(list(LEVELS)),
    )
    lfq = _pair(
        plan,
        lambda: LFQ(BITS, bound="tanh", regularize=False),
        lambda: vqp().LFQ(soft_clamp_input_value=1.0, **signs),
        commitment=0.0,
    )
    bsq = _pair(
        plan,
        lambda: BSQ(BITS, regularize=False),
        lambda: vqp().LFQ(spherical=True, commitment_loss_weight=0.25, **signs),
        commitment=0.25,
    )
    return [
        Work(_FSQ, log2(prod(LEVELS)), plan, fsq),
        Work(_LFQ, BITS, plan, lfq),
        Work(_BSQ, BITS, plan, bsq),
    ]


def _pair(
    plan: Plan, mine: Callable[[], Any], theirs: Callable[[], Any], **weights: float
) -> dict[str, Callable[[], Trainer]]:
    def of_vqp() -> Trainer:
        vqp()
        return behind_linear(VQP, theirs, plan)

    return {XQ: lambda: behind_linear(XQ, mine, plan, **weights), VQP: of_vqp}


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
        return [vq_work(16, plan), *linear_works(plan), pq_work(2, plan), rq_work(2, plan)]
    plan = Plan(batch=2048, epochs=3)
    return [
        vq_work(256, Plan(batch=1536, epochs=1)),
        vq_work(1024, plan),
        vq_work(4096, Plan(batch=4096, epochs=3, revive=0.1)),
        *linear_works(Plan(batch=1024, epochs=3)),
        *(pq_work(parts, plan._replace(epochs=1)) for parts in (4, 8)),
        *(rq_work(depth, plan) for depth in (4, 8)),
    ]


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
    # where both do the same arithmetic the last digits differ
    Error(None, 1.001, VQP),
    *(Sooner(_vq_name(codebook_size), 1.0, FAISS) for codebook_size in (256, 1024, 4096)),
    *(Sooner(_pq_name(parts), 1.0, FAISS) for parts in (4, 8)),
    *(Sooner(_rq_name(depth), 1.0, FAISS) for depth in (4, 8)),
]


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
    used = " / ".join(filter(None, (_used(c["used_test"]), _used(c["used_train"]))))
    return "<br>".join(filter(None, (_error(c["mse"]), used, took)))


def _error(mse: float) -> str:
    return f"{1000 * mse:.4g}"


def _used(part: float | None) -> str:
    return "" if part is None else f"{100 * part:.1f} %"


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
            document["cases"].append(measured(work, data, 1 if options.quick else ROUNDS))
            print(block(document["cases"][-1]), flush=True)
    except Red as red:
        print(f"\nRED, no numbers: {red}", file=sys.stderr)
        return 1
    harness.closed(BENCHMARK, document, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
