"""What was asked of xq, as data, so that every table shows it beside what was measured."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from benchmarks.cases import XQ
from benchmarks.words import memory, ratio, share, time

BEST_PEER = "the best peer"


@dataclass(frozen=True)
class Asked(ABC):
    """One line of the table.

    Attributes:
        work: The name of a case; None for each case, of which the worst then counts.
        bound: The number that was asked for.
        against: What with.
        ours: Which contender of ours.
    """

    work: str | None
    bound: float
    against: str = ""
    ours: str = XQ
    more_is_better: ClassVar[bool] = True

    @property
    @abstractmethod
    def wanted(self) -> str:
        """`bound` in words."""

    @abstractmethod
    def value(self, case: dict[str, Any], ours: dict[str, Any]) -> float | None:
        """The number of one measured case, in which `ours` took part; None if it has none."""

    @abstractmethod
    def words(self, value: float) -> str:
        """Such a number in words."""

    def met(self, value: float) -> bool:
        """Whether that is enough."""
        return value >= self.bound if self.more_is_better else value <= self.bound


def judged(asked: Asked, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """A line of the table, as JSON."""
    line = {
        "work": asked.work or "every one of these",
        "ours": asked.ours,
        "against": asked.against,
        "asked": asked.wanted,
        "measured": None,
        "met": None,
    }
    values = {}
    for case in cases:
        ours = contender(case, asked.ours)
        if asked.work in (None, case["name"]) and ours is not None:
            value = asked.value(case, ours)
            if value is not None:
                values[case["name"]] = value
    if values:
        where = (min if asked.more_is_better else max)(values, key=lambda name: values[name])
        aside = "" if asked.work else f" ({where})"
        line["measured"] = asked.words(values[where]) + aside
        line["met"] = asked.met(values[where])
    return line


def contender(case: dict[str, Any], name: str | None) -> dict[str, Any] | None:
    """The numbers of one contender of a measured case."""
    return next((c for c in case["contenders"] if c["name"] == name), None)


@dataclass(frozen=True)
class Faster(Asked):
    """So many times as fast as `against`, a contender or the best peer."""

    @property
    def wanted(self) -> str:
        return f"{self.bound:g}x"

    def value(self, case: dict[str, Any], ours: dict[str, Any]) -> float | None:
        peer = contender(case, case["best_peer"] if self.against == BEST_PEER else self.against)
        return None if peer is None else peer["median"] / ours["median"]

    def words(self, value: float) -> str:
        return ratio(value)


@dataclass(frozen=True)
class OfLimit(Asked):
    """At least this share of the limit that the same run measured."""

    against: str = "the limit"

    @property
    def wanted(self) -> str:
        return share(self.bound)

    def value(self, case: dict[str, Any], ours: dict[str, Any]) -> float | None:
        return ours["of_limit"]

    def words(self, value: float) -> str:
        return share(value)


@dataclass(frozen=True)
class Smaller(Asked):
    """No more extra memory than so many bytes."""

    against: str = "extra memory"
    more_is_better: ClassVar[bool] = False

    @property
    def wanted(self) -> str:
        return f"under {memory(self.bound).replace('.00', '')}"

    def value(self, case: dict[str, Any], ours: dict[str, Any]) -> float | None:
        return ours["peak_bytes"]

    def words(self, value: float) -> str:
        return memory(value)


@dataclass(frozen=True)
class Within(Asked):
    """At most so many seconds."""

    against: str = "time"
    more_is_better: ClassVar[bool] = False

    @property
    def wanted(self) -> str:
        return f"at most {self.bound:g} s"

    def value(self, case: dict[str, Any], ours: dict[str, Any]) -> float | None:
        return ours["median"]

    def words(self, value: float) -> str:
        return time(value)
