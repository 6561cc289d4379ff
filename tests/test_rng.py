from __future__ import annotations

import subprocess
import sys

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustfpd.rng import derive, generator

PURPOSE = st.lists(st.one_of(st.text(max_size=5), st.integers()), max_size=3)


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(), purpose=PURPOSE)
def test_a_derived_seed_is_repeatable_and_torch_takes_it(seed: int, purpose: list[str | int]) -> None:
    value = derive(seed, *purpose)
    assert value == derive(seed, *purpose)
    assert 0 <= value < 2**63
    assert generator(seed, *purpose).initial_seed() == value


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(), purpose=PURPOSE, other=st.integers(), other_purpose=PURPOSE)
def test_seeds_of_different_purposes_differ(
    seed: int, purpose: list[str | int], other: int, other_purpose: list[str | int]
) -> None:
    same = (seed, purpose) == (other, other_purpose)
    assert (derive(seed, *purpose) == derive(other, *other_purpose)) == same


def test_purposes_are_not_concatenated() -> None:
    assert derive(0, "ab", "c") != derive(0, "a", "bc")
    assert derive(0, "1") != derive(0, 1)
    assert derive(1, 2) != derive(12)


def test_a_derived_seed_is_the_same_in_every_process() -> None:
    code = "from robustfpd.rng import derive; print(derive(7, 'noise', 3))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(printed) == derive(7, "noise", 3)


def test_generators_draw_the_same_numbers_and_leave_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    first = torch.rand(5, generator=generator(3, "a"))
    assert torch.equal(first, torch.rand(5, generator=generator(3, "a")))
    assert not torch.equal(first, torch.rand(5, generator=generator(4, "a")))
    assert torch.equal(before, torch.random.get_rng_state())
