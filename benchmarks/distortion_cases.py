"""What is trained and compared: codebooks, products, residuals and codes behind linear maps."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log2, prod
from typing import Any

from benchmarks.cases import XQ
from benchmarks.coders import (
    BEAM,
    FAISS,
    Plan,
    Trainer,
    averaged,
    behind_linear,
    faiss_codes,
    faiss_kmeans,
    ours,
    vqp_averaged,
)
from benchmarks.patches import DIM
from benchmarks.peers import VQP, vqp
from xq.quantizers import BSQ, FSQ, LFQ, ProductQuantizer, ResidualQuantizer

# a part of a residual or product
BYTE = 256
BITS, LEVELS = 12, (8, 8, 8, 8)


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
    return Work(vq_name(codebook_size), log2(codebook_size), plan, trainers)


def rq_work(depth: int, plan: Plan) -> Work:
    """A sum of codes, found greedily and by beam search."""
    sizes = {"num_quantizers": depth, "codebook_size": BYTE}
    trainers = {
        XQ: lambda: ours(lambda: ResidualQuantizer(averaged(DIM, BYTE), depth), plan),
        FAISS: lambda: faiss_codes("ResidualQuantizer", depth),
        FAISS + BEAM: lambda: faiss_codes("ResidualQuantizer", depth, beam=True),
        VQP: lambda: vqp_averaged("ResidualVQ", plan, **sizes),
    }
    return Work(rq_name(depth), depth * log2(BYTE), plan, trainers)


def pq_work(parts: int, plan: Plan) -> Work:
    """A code for each part of the channels."""
    sizes = {"num_quantizers": 1, "groups": parts, "codebook_size": BYTE}
    trainers = {
        XQ: lambda: ours(lambda: ProductQuantizer(averaged(DIM // parts, BYTE), P=parts), plan),
        FAISS: lambda: faiss_codes("ProductQuantizer", parts),
        VQP: lambda: vqp_averaged("GroupedResidualVQ", plan, **sizes),
    }
    return Work(pq_name(parts), parts * log2(BYTE), plan, trainers)


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


def vq_name(codebook_size: int) -> str:
    return f"VQ {codebook_size}"


def rq_name(depth: int) -> str:
    return f"RQ {depth} x {BYTE}"


def pq_name(parts: int) -> str:
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
