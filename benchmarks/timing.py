"""Interleaved rounds: all contenders see the same busy and quiet moments of the machine."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from statistics import median, quantiles

import torch

# a sample shorter than this would time the clock and cold caches
SAMPLE = 0.02
MOST_ROUNDS = 25
_PAUSE = 0.002
# rounds that a contender gets even where they overrun its share of the time
FEW, SHORT, LONG = 5, 3, 0.5


@dataclass(frozen=True)
class Times:
    """Seconds a call, one number a round.

    Attributes:
        seconds: In the order of the rounds; each the mean over `calls` calls.
        calls: How many calls make one sample.
    """

    seconds: list[float]
    calls: int = 1

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.seconds)

    @property
    def spread(self) -> float | None:
        """Half the distance between the quartiles, as a share of the median; of one, unknown."""
        if len(self.seconds) < 2:
            return None
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def rounds_each(seconds: list[float], budget: float) -> list[int]:
    """How many rounds each contender gets: equal time for all, within reason.

    Args:
        seconds: That one sample of each takes.
        budget: For all together; overrun where someone needs more for the fewest rounds.
    """
    fair = budget / max(len(seconds), 1)
    fewest = [SHORT if s > LONG else FEW for s in seconds]
    pairs = zip(seconds, fewest, strict=True)
    return [min(max(int(fair / s), few), MOST_ROUNDS) for s, few in pairs]


def schedule(rounds: list[int]) -> Iterator[list[int]]:
    """Who runs in each round, in order.

    The order changes, so that nobody always follows the same one; and a contender with fewer
    rounds than others takes part in evenly spread ones.
    """
    most = max(rounds, default=0)
    shuffled = Random(0)
    for r in range(most):
        order = list(range(len(rounds)))
        shuffled.shuffle(order)
        # whether the whole number of rounds that are due by now has just grown
        yield [i for i in order if (r + 1) * rounds[i] // most > r * rounds[i] // most]


def interleaved(
    samplers: Mapping[str, Callable[[], float]], rounds: list[int]
) -> dict[str, list[float]]:
    """Samples of each contender, taken in turn."""
    names = list(samplers)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in schedule(rounds):
        for i in turn:
            # threads that wait busily for more of the last one's work give up meanwhile
            time.sleep(_PAUSE)
            taken[names[i]].append(samplers[names[i]]())
    return taken


def seconds_a_call(run: Callable[[], object], calls: int, device: str) -> float:
    """Mean time of `calls` calls; on CUDA between two events of the device."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / calls
    begun = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begun) / calls


def time_all(
    runs: Mapping[str, Callable[[], object]],
    device: str,
    budget: float,
    known: Mapping[str, float],
) -> dict[str, Times]:
    """Times the contenders, in about `budget` seconds.

    Args:
        runs: By name.
        device: Where they run.
        budget: For all together.
        known: About how long a call takes, of those that need not be tried out.
    """
    once = {
        name: known[name] if name in known else seconds_a_call(run, 1, device)
        for name, run in runs.items()
    }
    calls = {name: max(round(SAMPLE / max(s, 1e-6)), 1) for name, s in once.items()}
    rounds = rounds_each([once[name] * calls[name] for name in runs], budget)
    return in_turn(runs, device, calls, rounds)


def in_turn(
    runs: Mapping[str, Callable[[], object]],
    device: str,
    calls: Mapping[str, int],
    rounds: list[int],
) -> dict[str, Times]:
    """Times so many calls of each, so many times."""
    samplers = {
        name: partial(seconds_a_call, run, calls[name], device) for name, run in runs.items()
    }
    taken = interleaved(samplers, rounds)
    return {name: Times(seconds, calls[name]) for name, seconds in taken.items()}
