from __future__ import annotations

import pytest

from benchmarks.timing import Implementation, RoundLimits, Timing, interleave, quartiles


class Clock:
    """A clock that advances only by the seconds of an implementation's run, times `load`."""

    def __init__(self) -> None:
        self.now, self.load, self.order = 0.0, 1.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def implementation(self, name: str, seconds: float) -> Implementation:
        def run() -> str:
            self.order.append(name)
            self.now += self.load * seconds
            return name.upper()

        return Implementation(name, run)


def test_implementations_run_in_turns_in_a_rotating_order_after_a_warm_up() -> None:
    clock = Clock()
    timing = interleave([clock.implementation(n, 1) for n in "abc"], RoundLimits(3, 100), clock=clock)
    assert "".join(clock.order) == "abc" + "abc" + "bca" + "cab"
    assert timing.seconds == {"a": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3}
    assert timing.returned == {"a": "A", "b": "B", "c": "C"}


def test_no_round_starts_after_the_time_limit_except_the_minimal_number() -> None:
    clock = Clock()
    assert interleave([clock.implementation("a", 10)], RoundLimits(9, 45), clock=clock).rounds == 5
    assert interleave([clock.implementation("a", 1000)], RoundLimits(9, 45), clock=clock).rounds == 3
    assert interleave([clock.implementation("a", 1000)], RoundLimits(9, 45, least=1), clock=clock).rounds == 1
    assert interleave([clock.implementation("a", 1)], RoundLimits(9, 45), clock=clock).rounds == 9


def test_synchronization_is_timed() -> None:
    clock = Clock()

    def wait() -> None:
        clock.now += 5

    timing = interleave([clock.implementation("a", 1)], RoundLimits(3, 100), clock=clock, synchronize=wait)
    assert timing.seconds["a"] == [6.0] * 3


def test_load_within_a_round_does_not_change_the_ratio() -> None:
    timing = Timing({"a": [2.0, 20.0, 4.0, 8.0, 6.0], "b": [1.0, 10.0, 2.0, 4.0, 3.0]}, {})
    ratio = timing.ratio("a", "b")
    assert (ratio.low, ratio.median, ratio.high, ratio.count) == (2.0, 2.0, 2.0, 5)
    assert timing.quartiles("a").median == 6.0
    assert timing.ratio("b", "a", scale=3.0).median == 1.5


def test_quartiles_include_the_median() -> None:
    values = quartiles([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (values.low, values.median, values.high) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]).model_dump() == {"median": 7.0, "low": 7.0, "high": 7.0, "count": 1}


def test_duplicate_names_are_refused() -> None:
    with pytest.raises(AssertionError):
        interleave([Clock().implementation("a", 1)] * 2, RoundLimits(3, 1))
