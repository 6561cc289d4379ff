from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import kstest
from torch import Tensor

from robustfpd.attacks import norms
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import NORMS
from robustfpd.errors import InputError

Array = NDArray[np.float64]

pixel = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1, width=32))
change = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 1e4, -1e4]), st.floats(-3, 3, width=32))


class Case(NamedTuple):
    images: Tensor
    delta: Tensor
    eps: float


@st.composite
def cases(draw: st.DrawFn) -> Case:
    pairs = draw(st.lists(st.tuples(pixel, change), min_size=12, max_size=12))
    values = torch.tensor(pairs, dtype=torch.float32)
    images, delta = (values[:, i].reshape(2, 1, 2, 3).contiguous() for i in (0, 1))
    return Case(images, delta, draw(st.floats(1e-3, 1)))


def _flat(x: Tensor) -> Array:
    return np.asarray(x.double().flatten(1).numpy(), dtype=np.float64)


def _norm(norm: str, delta: Array) -> float:
    return float(np.linalg.norm(delta, {"linf": np.inf, "l2": 2, "l1": 1}[norm]))


def _reference(norm: str, delta: Array, image: Array, eps: float) -> Array:
    low, high = -image, 1 - image

    def at(multiplier: float) -> Array:
        if norm == "l2":
            images_moved: Array = delta / (1 + multiplier)
        else:
            images_moved = np.sign(delta) * np.maximum(np.abs(delta) - multiplier, 0)
        return np.minimum(np.maximum(images_moved, low), high)

    if norm == "linf":
        nearest: Array = np.clip(delta, np.maximum(low, -eps), np.minimum(high, eps))
        return nearest
    if _norm(norm, at(0)) <= eps:
        return at(0)
    largest = np.abs(delta).max() if norm == "l1" else np.linalg.norm(delta) / eps
    return at(float(brentq(lambda m: _norm(norm, at(m)) - eps, 0, float(largest), xtol=1e-13)))


@pytest.mark.parametrize("norm", NORMS)
@settings(deadline=None, derandomize=True, max_examples=120)
@given(case=cases())
def test_projection_is_feasible_idempotent_and_the_nearest_point(norm: str, case: Case) -> None:
    ball = lp_ball(norm)
    projected = ball.project(case.delta, case.images, case.eps)
    images_moved = case.images + projected
    assert float(ball.norm(projected).max()) <= case.eps + 1e-6
    assert float(images_moved.min()) >= -1e-6
    assert float(images_moved.max()) <= 1 + 1e-6
    again = ball.project(projected, case.images, case.eps)
    torch.testing.assert_close(again, projected, atol=1e-6, rtol=0)
    for got, delta, image in zip(_flat(projected), _flat(case.delta), _flat(case.images), strict=True):
        np.testing.assert_allclose(
            got, _reference(norm, delta, image, case.eps), atol=2e-6 * max(1, np.abs(delta).max())
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [0.05, 0.5, 30.0])
@pytest.mark.parametrize("eps", [0.1, 1.0])
def test_projection_satisfies_the_variational_inequality(norm: str, scale: float, eps: float) -> None:
    draws = torch.Generator().manual_seed(5)
    images = torch.rand(8, 1, 6, 6, generator=draws, dtype=torch.float64)
    images[:, :, 0], images[:, :, 1] = 0, 1
    delta = scale * torch.randn(images.shape, generator=draws, dtype=torch.float64)
    projected = lp_ball(norm).project(delta, images, eps)
    for _ in range(200):
        other = torch.rand(images.shape, generator=draws, dtype=torch.float64) - images
        size = lp_ball(norm).norm(other)
        other = other * (eps / size).clamp_max(1).reshape(-1, 1, 1, 1)
        away = ((delta - projected) * (other - projected)).flatten(1).sum(1)
        assert float(away.max()) <= 1e-9 * scale


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("scale", [0.02, 0.3, 3.0])
@pytest.mark.parametrize("eps", [0.5, 5.0])
def test_projection_without_convergence_checks_and_in_chunks_is_equal(
    monkeypatch: pytest.MonkeyPatch, norm: str, scale: float, eps: float
) -> None:
    draws = torch.Generator().manual_seed(6)
    images = (1.6 * torch.rand(40, 3, 24, 24, generator=draws) - 0.3).clamp(0, 1)
    delta = scale * torch.randn(images.shape, generator=draws)
    radii = torch.linspace(eps / 2, eps, 40).reshape(-1, 1, 1, 1)
    projected = lp_ball(norm).project(delta, images, radii)
    monkeypatch.setattr(norms, "_can_synchronize", lambda values: False)
    monkeypatch.setattr(norms, "CPU_CHUNK", 1 << 30)
    torch.testing.assert_close(lp_ball(norm).project(delta, images, radii), projected, atol=1e-6, rtol=0)
    one = lp_ball(norm).project(delta[7:8], images[7:8], float(radii[7]))
    torch.testing.assert_close(one, projected[7:8], atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_is_the_identity_inside(norm: str, dtype: torch.dtype) -> None:
    draws = torch.Generator().manual_seed(1)
    images = 0.2 + 0.6 * torch.rand(5, 3, 4, 4, generator=draws, dtype=dtype)
    delta = 0.1 * (2 * torch.rand(images.shape, generator=draws, dtype=dtype) - 1)
    eps = 1.01 * float(lp_ball(norm).norm(delta).max())
    torch.testing.assert_close(lp_ball(norm).project(delta, images, eps), delta, atol=1e-7, rtol=0)
    zero = torch.zeros_like(delta)
    assert torch.equal(lp_ball(norm).project(zero, images, 1e-3), zero)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_keeps_the_signs(norm: str) -> None:
    draws = torch.Generator().manual_seed(2)
    images = torch.rand(4, 1, 5, 5, generator=draws).round(decimals=1)
    delta = torch.randn(images.shape, generator=draws)
    projected = lp_ball(norm).project(delta, images, 0.3)
    assert float((projected * delta).min()) >= 0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalize_gives_unit_norm_at_any_scale_of_the_gradient(norm: str, scale: float, dtype: torch.dtype) -> None:
    gradient = scale * torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(3), dtype=dtype)
    direction = lp_ball(norm).normalize(gradient)
    assert direction.dtype == dtype
    torch.testing.assert_close(lp_ball(norm).norm(direction), torch.ones(6, dtype=dtype), atol=1e-5, rtol=0)
    assert bool((direction * gradient.sign() >= 0).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_zero_gradient_normalizes_to_zero(norm: str, dtype: torch.dtype) -> None:
    gradient = torch.zeros(2, 1, 3, 3, dtype=dtype)
    gradient[1] = 1
    direction = lp_ball(norm).normalize(gradient)
    assert torch.equal(direction[0], gradient[0])
    assert bool(direction[1].isfinite().all())


def test_normalized_gradients_attain_the_dual_norm_in_l2_and_linf() -> None:
    gradient = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    for norm, dual in (("linf", 1), ("l2", 2)):
        slope = (lp_ball(norm).normalize(gradient) * gradient).flatten(1).sum(1)
        torch.testing.assert_close(slope, gradient.flatten(1).norm(p=dual, dim=1))


@pytest.mark.parametrize("norm", NORMS)
@settings(deadline=None, derandomize=True, max_examples=30)
@given(seed=st.integers(0, 2**31), eps=st.floats(1e-3, 1), corners=st.booleans())
def test_samples_lie_in_ball_and_box(norm: str, seed: int, eps: float, corners: bool) -> None:
    images = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    images = images.round() if corners else images
    delta = lp_ball(norm).sample(images, eps, torch.Generator().manual_seed(seed + 1))
    assert delta.dtype == images.dtype
    assert float(lp_ball(norm).norm(delta).max()) <= eps + 1e-6
    assert float((images + delta).min()) >= -1e-6
    assert float((images + delta).max()) <= 1 + 1e-6
    assert float(delta.abs().max()) > 0


@pytest.mark.parametrize("norm", NORMS)
def test_the_seed_decides_the_samples(norm: str) -> None:
    images = torch.full((3, 1, 4, 4), 0.5)
    draw = [lp_ball(norm).sample(images, 0.3, torch.Generator().manual_seed(s)) for s in (7, 7, 8)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    assert not torch.equal(draw[0][0], draw[0][1])


@pytest.mark.parametrize("norm", NORMS)
def test_samples_fill_the_ball_uniformly(norm: str) -> None:
    images, eps = torch.full((2000, 1, 2, 2), 0.5), 0.2
    delta = lp_ball(norm).sample(images, eps, torch.Generator().manual_seed(0))
    volume = (lp_ball(norm).norm(delta).double() / eps).pow(4)
    assert kstest(volume.numpy(), "uniform").pvalue > 1e-3
    assert abs(float((delta > 0).double().mean()) - 0.5) < 0.03


def test_norms() -> None:
    delta = torch.tensor([[[[3.0, -4.0]]], [[[0.0, 0.5]]]])
    assert lp_ball("linf").norm(delta).tolist() == [4, 0.5]
    assert lp_ball("l2").norm(delta).tolist() == [5, 0.5]
    assert lp_ball("l1").norm(delta).tolist() == [7, 0.5]


def test_an_unknown_norm_is_an_error_that_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown norm 'manhattan'.*l1.*l2.*linf") as caught:
        lp_ball("manhattan")
    assert isinstance(caught.value, InputError)
    with pytest.raises(ValueError, match=r"did you mean.*'linf'"):
        lp_ball("Linf")


def test_an_unsupported_norm_is_an_error_that_lists_the_supported_ones() -> None:
    with pytest.raises(ValueError, match=r"deepfool does not offer norm 'l1'; it offers linf, l2"):
        lp_ball("l1", ("linf", "l2"), "deepfool")
    assert lp_ball("l2", ("linf", "l2"), "deepfool").name == "l2"
