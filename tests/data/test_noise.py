from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustfpd.data.transforms import add_uniform_noise, uniform_like


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(eps=st.floats(1e-3, 1), seed=st.integers(0, 2**31))
def test_noise_stays_within_its_half_width(eps: float, seed: int) -> None:
    images = torch.rand(4, 3, 5, 7, generator=seeded(seed + 1), dtype=torch.float64)
    noise = add_uniform_noise(images, eps, seeded(seed)) - images
    assert noise.abs().max() <= eps + 1e-12
    assert noise.abs().max() > 0.8 * eps


def test_noise_is_uniform_about_zero() -> None:
    draws = uniform_like(torch.zeros(200_000), seeded())
    error = 4 / 200_000**0.5  # four standard errors of a variable with |x| ≤ 1
    assert draws.mean().abs() < error
    assert (draws.square().mean() - 1 / 3).abs() < error
    quarters = torch.histc(draws, bins=4, min=-1, max=1) / 200_000
    assert (quarters - 0.25).abs().max() < error


def test_noise_is_not_clipped() -> None:
    white = add_uniform_noise(torch.ones(1000), 0.1, seeded())
    black = add_uniform_noise(torch.zeros(1000), 0.1, seeded())
    assert (white > 1).float().mean() == pytest.approx(0.5, abs=0.08)
    assert (black < 0).float().mean() == pytest.approx(0.5, abs=0.08)


def test_the_generator_alone_decides() -> None:
    images = torch.rand(2, 1, 4, 4)
    state = torch.random.get_rng_state()
    first = add_uniform_noise(images, 0.3, seeded())
    assert torch.equal(first, add_uniform_noise(images, 0.3, seeded()))
    assert not torch.equal(first, add_uniform_noise(images, 0.3, seeded(1)))
    assert torch.equal(state, torch.random.get_rng_state())


def test_no_noise_returns_the_images_themselves() -> None:
    images = torch.rand(2, 1, 4, 4)
    assert add_uniform_noise(images, 0, seeded()) is images


def test_the_images_are_left_alone() -> None:
    images = torch.rand(2, 1, 4, 4)
    before = images.clone()
    add_uniform_noise(images, 0.5, seeded())
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_keeps_type_and_shape(dtype: torch.dtype) -> None:
    noisy = add_uniform_noise(torch.zeros(2, 3, 4, 5, dtype=dtype), 0.1, seeded())
    assert noisy.dtype == dtype
    assert noisy.shape == (2, 3, 4, 5)
