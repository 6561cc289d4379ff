"""Contenders of one workload, timed against each other in one process.

On a machine that others use too, absolute times are noise. So contenders take turns, round by round, in an order that
rotates, and the ratio of two is taken within each round, where both met the same load.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from robustfpd.benchmark.result import Spread

LEAST = 3
"""Rounds that are run whatever they take."""


@dataclass(frozen=True)
class Contender:
    """Somebody who does a workload."""

    name: str
    run: Callable[[], Any]


@dataclass(frozen=True)
class Pace:
    """How long to go on."""

    rounds: int
    """Rounds at most."""
    limit: float
    """Seconds after which no further round begins, once there were enough."""
    least: int = LEAST
    """Rounds at least."""


@dataclass(frozen=True)
class Timing:
    """Seconds of each contender in each round, and what it returned last."""

    seconds: dict[str, list[float]]
    returned: dict[str, Any]

    @property
    def rounds(self) -> int:
        """How many rounds there were."""
        return len(next(iter(self.seconds.values())))

    def spread(self, name: str) -> Spread:
        """Seconds of a contender."""
        return spread(self.seconds[name])

    def ratio(self, name: str, reference: str, scale: float = 1.0) -> Spread:
        """A contender's time over another's, taken in each round, times `scale`."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return spread([scale * one / other for one, other in pairs])


def interleave(
    contenders: Sequence[Contender],
    pace: Pace,
    *,
    synchronise: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    warm_ups: int = 1,
) -> Timing:
    """Let contenders take turns, after a warm-up that is not counted.

    Args:
        contenders: who runs; names are unique.
        pace: how many rounds, and how long.
        synchronise: waits until the device has done what it was given.
        clock: seconds.
        warm_ups: runs of each before the first round.
    """
    assert len({c.name for c in contenders}) == len(contenders) > 0
    timing = Timing({c.name: [] for c in contenders}, {})
    for contender in contenders:
        for _ in range(warm_ups):
            timing.returned[contender.name] = contender.run()
    synchronise()
    begun = clock()
    for number in range(max(pace.rounds, pace.least)):
        if number >= pace.least and clock() - begun >= pace.limit:
            break
        first = number % len(contenders)
        gc.collect(1)
        for contender in (*contenders[first:], *contenders[:first]):
            timing.seconds[contender.name].append(_timed(contender, timing, synchronise, clock))
    return timing


def _timed(
    contender: Contender, timing: Timing, synchronise: Callable[[], None], clock: Callable[[], float]
) -> float:  # fmt: skip
    """One run; garbage is left for the time between rounds, as `timeit` does."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        timing.returned[contender.name] = contender.run()
        synchronise()
        return clock() - start
    finally:
        if collecting:
            gc.enable()


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    if len(values) == 1:
        return Spread(median=values[0], low=values[0], high=values[0], count=1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=median, low=low, high=high, count=len(values))
