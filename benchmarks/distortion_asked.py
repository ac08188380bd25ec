"""What is asked of trained codes: their error, their time and their use, beside others'."""

from dataclasses import dataclass
from typing import Any, ClassVar

from benchmarks.asked import Asked, contender
from benchmarks.cases import XQ
from benchmarks.coders import BEAM, FAISS
from benchmarks.distortion_cases import pq_name, rq_name, vq_name
from benchmarks.peers import VQP
from benchmarks.words import share


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
        return share(self.bound, 1)

    def value(self, case: dict[str, Any], ours: dict[str, Any]) -> float | None:
        return ours["used_train"]

    def words(self, value: float) -> str:
        return share(value, 1)


ASKED: list[Asked] = [
    *(
        line
        for codebook_size, bound in ((256, 1.02), (1024, 1.02), (4096, 1.03))
        for line in (
            Error(vq_name(codebook_size), bound, FAISS),
            Used(vq_name(codebook_size), 0.999),
        )
    ),
    *(Error(pq_name(parts), 1.02, FAISS) for parts in (4, 8)),
    *(
        line
        for depth in (4, 8)
        for line in (
            Error(rq_name(depth), 1.0, FAISS),
            Error(rq_name(depth), 1.0, FAISS + BEAM, XQ + BEAM),
            Error(rq_name(depth), 0.88, XQ, XQ + BEAM),
        )
    ),
    # where both do the same arithmetic the last digits differ
    Error(None, 1.001, VQP),
    *(Sooner(vq_name(codebook_size), 1.0, FAISS) for codebook_size in (256, 1024, 4096)),
    *(Sooner(pq_name(parts), 1.0, FAISS) for parts in (4, 8)),
    *(Sooner(rq_name(depth), 1.0, FAISS) for depth in (4, 8)),
]
