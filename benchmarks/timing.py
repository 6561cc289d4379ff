"""Times several implementations of one workload against each other in one process.

Absolute times on a shared machine are noisy. Implementations take turns, round by round, in an order that rotates, and
the ratio of two is taken within each round, where both ran under the same load.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.results import Quartiles


@dataclass(frozen=True)
class Implementation:
    """One way to run a workload."""

    name: str
    run: Callable[[], Any]


@dataclass(frozen=True)
class RoundLimits:
    """How many rounds are run."""

    rounds: int
    """Maximal number of rounds."""
    limit: float
    """Seconds after which no further round starts, once `least` rounds are done."""
    least: int = 3
    """Minimal number of rounds."""


@dataclass(frozen=True)
class Timing:
    """Seconds of each implementation in each round, and its last return value."""

    seconds: dict[str, list[float]]
    returned: dict[str, Any]

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(next(iter(self.seconds.values())))

    def quartiles(self, name: str) -> Quartiles:
        """Return the quartiles of an implementation's seconds."""
        return quartiles(self.seconds[name])

    def ratio(self, name: str, reference: str, scale: float = 1.0) -> Quartiles:
        """Return the quartiles of an implementation's time over another's, taken in each round, times `scale`."""
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return quartiles([scale * one / other for one, other in pairs])


def interleave(
    implementations: Sequence[Implementation],
    limits: RoundLimits,
    *,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    warm_ups: int = 1,
) -> Timing:
    """Time implementations in turns, after warm-up runs that are not counted.

    Args:
        implementations: what to run; names are unique.
        limits: number of rounds.
        synchronize: waits for the device to finish.
        clock: returns seconds.
        warm_ups: runs of each implementation before the first round.
    """
    assert len({i.name for i in implementations}) == len(implementations) > 0
    timing = Timing({i.name: [] for i in implementations}, {})
    for implementation in implementations:
        for _ in range(warm_ups):
            timing.returned[implementation.name] = implementation.run()
    synchronize()
    started = clock()
    for number in range(max(limits.rounds, limits.least)):
        if number >= limits.least and clock() - started >= limits.limit:
            break
        first = number % len(implementations)
        gc.collect(1)
        for implementation in (*implementations[first:], *implementations[:first]):
            timing.seconds[implementation.name].append(_timed(implementation, timing, synchronize, clock))
    return timing


def _timed(
    implementation: Implementation, timing: Timing, synchronize: Callable[[], None], clock: Callable[[], float]
) -> float:
    """Time one run with the garbage collector switched off, as `timeit` does."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        timing.returned[implementation.name] = implementation.run()
        synchronize()
        return clock() - start
    finally:
        if collecting:
            gc.enable()


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return median and quartiles."""
    if len(values) == 1:
        return Quartiles(median=values[0], low=values[0], high=values[0], count=1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median=median, low=low, high=high, count=len(values))


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Return a function that waits for the device to finish; on a CPU it returns at once."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return torch.mps.synchronize if device.type == "mps" else lambda: None
