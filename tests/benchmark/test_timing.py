from __future__ import annotations

import pytest

from robustfpd.benchmark.timing import Contender, Pace, Timing, interleave, spread


class Clock:
    """Time passes only where a contender says so, and by `load` times as much."""

    def __init__(self) -> None:
        self.now, self.load, self.order = 0.0, 1.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, seconds: float) -> Contender:
        def run() -> str:
            self.order.append(name)
            self.now += self.load * seconds
            return name.upper()

        return Contender(name, run)


def test_contenders_take_turns_in_an_order_that_rotates_after_a_warm_up() -> None:
    clock = Clock()
    timing = interleave([clock.contender(n, 1) for n in "abc"], Pace(3, 100), clock=clock)
    assert "".join(clock.order) == "abc" + "abc" + "bca" + "cab"
    assert timing.seconds == {"a": [1.0] * 3, "b": [1.0] * 3, "c": [1.0] * 3}
    assert timing.returned == {"a": "A", "b": "B", "c": "C"}


def test_a_slow_machine_ends_after_the_limit_but_not_before_three_rounds() -> None:
    clock = Clock()
    assert interleave([clock.contender("a", 10)], Pace(9, 45), clock=clock).rounds == 5
    assert interleave([clock.contender("a", 1000)], Pace(9, 45), clock=clock).rounds == 3
    assert interleave([clock.contender("a", 1000)], Pace(9, 45, least=1), clock=clock).rounds == 1
    assert interleave([clock.contender("a", 1)], Pace(9, 45), clock=clock).rounds == 9


def test_waiting_for_the_device_counts() -> None:
    clock = Clock()

    def wait() -> None:
        clock.now += 5

    timing = interleave([clock.contender("a", 1)], Pace(3, 100), clock=clock, synchronise=wait)
    assert timing.seconds["a"] == [6.0] * 3


def test_load_that_both_meet_in_a_round_leaves_their_ratio_as_it_is() -> None:
    timing = Timing({"a": [2.0, 20.0, 4.0, 8.0, 6.0], "b": [1.0, 10.0, 2.0, 4.0, 3.0]}, {})
    ratio = timing.ratio("a", "b")
    assert (ratio.low, ratio.median, ratio.high, ratio.count) == (2.0, 2.0, 2.0, 5)
    assert timing.spread("a").median == 6.0
    assert timing.ratio("b", "a", scale=3.0).median == 1.5


def test_the_spread_is_median_and_quartiles() -> None:
    found = spread([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.low, found.median, found.high) == (2.0, 3.0, 4.0)
    assert spread([7.0]).model_dump() == {"median": 7.0, "low": 7.0, "high": 7.0, "count": 1}


def test_two_contenders_of_one_name_are_refused() -> None:
    with pytest.raises(AssertionError):
        interleave([Clock().contender("a", 1)] * 2, Pace(3, 1))
