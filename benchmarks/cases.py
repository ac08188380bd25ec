"""What is compared: a case, the contenders that take part in it, and the gate before the clock."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# the contender that users get by default; all others are compared with it
XQ = "xq"


class Red(Exception):
    """A contender of ours gives a wrong result, so there is no number to give."""


class Skip(Exception):
    """Why a contender cannot take part."""


@dataclass(frozen=True)
class Contender:
    """One way to do the work.

    Attributes:
        name: As the tables show it.
        run: Does the work once and returns what the gate looks at.
        ours: Whether it is a part of xq.
    """

    name: str
    run: Callable[[], Any]
    ours: bool = False


@dataclass
class Case:
    """The same work for several contenders, on the same data.

    Attributes:
        check: The gate: takes each contender's result and returns what to say of it, or raises
            `Red` if one of ours is wrong.
        flops: What the work cannot do without, for the limit; 0, as in `bytes`, for no limit.
        bytes: What has to be read and written at least once.
        contenders: Those that take part.
        skipped: Those that do not, and why.
    """

    check: Callable[[dict[str, Any]], dict[str, str]]
    flops: float = 0.0
    bytes: float = 0.0
    contenders: list[Contender] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, build: Callable[[], Callable[[], Any]], *, ours: bool = False) -> None:
        """Lets the contender that `build` returns take part, unless it raises `Skip`."""
        try:
            self.contenders.append(Contender(name, build(), ours))
        except Skip as reason:
            self.skipped[name] = str(reason)

    def contender(self, name: str) -> Contender:
        """The contender of this name."""
        return next(c for c in self.contenders if c.name == name)


@dataclass(frozen=True)
class Spec:
    """How to make a case, in this process or in another one.

    Attributes:
        name: Of the case, as the tables show it.
        make: A function of a module, `make(device=..., **sizes)`.
        sizes: Its arguments.
        tiny: Arguments that make the same work small: a warm-up before memory is measured.
        sweeps: The sizes over which this case is one point of a curve; it then takes one line.
        seconds: About how long to time it, all contenders together.
    """

    name: str
    make: Callable[..., Case]
    sizes: dict[str, Any]
    tiny: dict[str, Any]
    sweeps: tuple[str, ...] = ()
    seconds: float = 10.0
