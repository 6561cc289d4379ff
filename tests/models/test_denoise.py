from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustfpd.errors import InputError
from robustfpd.models.denoise import (
    Bottleneck,
    NonLocal,
    denoising_layer,
    dot_product,
    gaussian,
    non_local_means,
    normalised,
    softmax,
)

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
KINDS = ("dot", "normalised", "softmax", "gaussian")


def maps(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def forms(kind: Any) -> list[Callable[..., Tensor]]:
    """The function as it runs, and its literal form."""
    means: Any = non_local_means(kind)
    return [means, means.__wrapped__]


def double_sum(x: Tensor, kind: str) -> Tensor:
    """The defining sum over pairs of positions, one position at a time."""
    n, c, h, w = x.shape
    out = torch.zeros_like(x)
    positions = [(i, j) for i in range(h) for j in range(w)]
    for image in range(n):
        dots = [float(x[image, :, i, j] @ x[image, :, k, m]) for i, j in positions for k, m in positions]
        frobenius = math.sqrt(sum(dot**2 for dot in dots)) or 1.0
        for i, j in positions:
            at = x[image, :, i, j]
            total, norm = torch.zeros(c, dtype=x.dtype), 0.0
            for k, m in positions:
                other = x[image, :, k, m]
                if kind in ("dot", "normalised"):
                    weight, unit = float(at @ other), 1.0
                elif kind == "softmax":
                    weight = unit = math.exp(float(at @ other) / math.sqrt(c))
                else:
                    weight = unit = math.exp(-float((at - other).square().sum()) / (2 * c))
                total, norm = total + weight * other, norm + unit
            out[image, :, i, j] = total / (frobenius if kind == "normalised" else norm)
    return out


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, derandomize=True, max_examples=15)
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_means_are_the_sum_over_all_pairs_of_positions(kind: Any, shape: tuple[int, int, int, int], seed: int) -> None:
    x = maps(shape, seed)
    expected = double_sum(x, kind)
    for means in forms(kind):
        assert torch.allclose(means(x), expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(shape=SHAPES, seed=st.integers(0, 1000), scale=st.floats(0.01, 30))
def test_normalised_affinities_give_convex_combinations(
    shape: tuple[int, int, int, int], seed: int, scale: float
) -> None:
    x = maps(shape, seed) * scale
    for means in (softmax(x), gaussian(x)):
        slack = 1e-9 * scale
        assert bool((means <= x.amax(dim=(2, 3), keepdim=True) + slack).all())
        assert bool((means >= x.amin(dim=(2, 3), keepdim=True) - slack).all())


@settings(deadline=None, derandomize=True, max_examples=30)
@given(shape=SHAPES, seed=st.integers(0, 1000), scale=st.floats(0.1, 1e3))
def test_normalised_means_are_linear_in_the_scale_and_no_longer_than_the_map(
    shape: tuple[int, int, int, int], seed: int, scale: float
) -> None:
    x = maps(shape, seed)
    for means in forms("normalised"):
        found = means(x)
        assert torch.allclose(means(scale * x), scale * found, rtol=1e-9, atol=1e-12)
        lengths = [m.flatten(1).norm(dim=1) for m in (found, x)]
        assert bool((lengths[0] <= lengths[1] * (1 + 1e-9)).all())


def test_normalised_means_of_a_map_of_rank_one_are_the_map() -> None:
    x = torch.randn(2, 5, 1, 1, dtype=torch.float64) * torch.randn(2, 1, 3, 4, dtype=torch.float64)
    for means in forms("normalised"):
        assert torch.allclose(means(x), x, rtol=1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 30, 4, 4)])
def test_normalised_means_of_zeros_are_zeros_with_finite_gradients(shape: tuple[int, ...]) -> None:
    for means in forms("normalised"):
        x = torch.zeros(shape, requires_grad=True)
        out = means(x, residual=True)
        assert not bool(out.any())
        (slope,) = torch.autograd.grad(out.sum(), x)
        assert bool(slope.isfinite().all())


@pytest.mark.parametrize("scale", [10.0**power for power in range(-24, 9, 2)])
def test_normalised_means_and_their_gradients_are_finite_at_every_scale(scale: float) -> None:
    values = scale * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for means in forms("normalised"):
        x = values.clone().requires_grad_()
        out = means(x)
        assert bool(out.detach().norm() <= 1.001 * values.norm())
        (slope,) = torch.autograd.grad(out.sum(), x)
        assert bool(out.isfinite().all())
        assert bool(slope.isfinite().all())


@pytest.mark.parametrize("kind", [*KINDS, "bottleneck"])
def test_a_gated_layer_starts_as_the_identity_and_adds_its_means_by_the_gate(kind: Any) -> None:
    layer = denoising_layer(kind, 4, gate=True)
    assert isinstance(layer, NonLocal | Bottleneck)
    assert layer.gate is not None
    layer.double()
    x = maps((2, 4, 3, 3), 0).requires_grad_()
    assert torch.equal(layer(x), x)
    weights = torch.randn_like(x)
    (slope,) = torch.autograd.grad((layer(x) * weights).sum(), layer.gate)
    means = layer.project(normalised(x)) if isinstance(layer, Bottleneck) else non_local_means(kind)(x)
    assert torch.allclose(slope, (means * weights).sum())  # the first step opens it
    with torch.no_grad():
        layer.gate.fill_(-0.7)
    assert torch.allclose(layer(x), x - 0.7 * means)


@pytest.mark.parametrize("kind", ["softmax", "gaussian"])
def test_a_constant_map_is_its_own_average(kind: Any) -> None:
    x = torch.randn(2, 5, 1, 1, dtype=torch.float64).expand(2, 5, 3, 4)
    assert torch.allclose(non_local_means(kind)(x), x)


def test_the_gaussian_affinity_does_not_depend_on_the_origin() -> None:
    x = maps((2, 5, 3, 4), 0)
    assert torch.allclose(gaussian(x + 7), gaussian(x) + 7, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_adds_the_means_to_its_input(kind: Any) -> None:
    layer = denoising_layer(kind, 4)
    assert isinstance(layer, NonLocal)
    assert not list(layer.parameters())
    x = maps((2, 4, 3, 3), 0)
    assert torch.allclose(layer(x), x + double_sum(x, kind), atol=1e-9)
    assert non_local_means(kind).__name__ in repr(layer)


def test_a_bottleneck_with_the_identity_is_the_dot_product_layer() -> None:
    layer = denoising_layer("bottleneck", 4)
    assert isinstance(layer, Bottleneck)
    layer.double()
    with torch.no_grad():
        layer.project.weight.copy_(torch.eye(4).reshape(4, 4, 1, 1))
        assert layer.project.bias is not None
        layer.project.bias.zero_()
    x = maps((2, 4, 3, 3), 0)
    dot = denoising_layer("dot", 4)
    assert dot is not None
    assert torch.allclose(layer(x), dot(x))


def test_none_is_no_layer() -> None:
    assert denoising_layer("none", 4) is None


def test_an_unknown_layer_names_the_choices() -> None:
    with pytest.raises(InputError, match="unknown denoise 'dott'; did you mean 'dot'"):
        denoising_layer("dott", 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bottleneck", "none"])
def test_the_middle_denoising_of_other_kinds_is_the_dot_product(kind: Any) -> None:
    assert non_local_means(kind) is dot_product
