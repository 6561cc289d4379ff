from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustfpd.errors import InputError
from robustfpd.models import denoise
from robustfpd.models.denoise import (
    Bottleneck,
    NonLocal,
    affinity,
    denoising_layer,
    dot_product,
    gaussian_affinity,
    softmax_affinity,
)

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))


def maps(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def double_sum(x: Tensor, kind: str) -> Tensor:
    """The defining sum over pairs of positions, one position at a time."""
    n, c, h, w = x.shape
    out = torch.zeros_like(x)
    positions = [(i, j) for i in range(h) for j in range(w)]
    for image in range(n):
        for here in positions:
            at = x[image, :, here[0], here[1]]
            total, norm = torch.zeros(c, dtype=x.dtype), 0.0
            for there in positions:
                other = x[image, :, there[0], there[1]]
                if kind == "dot":
                    weight, unit = float(at @ other), 1.0
                elif kind == "softmax":
                    weight = unit = math.exp(float(at @ other) / math.sqrt(c))
                else:
                    weight = unit = math.exp(-float((at - other).square().sum()) / (2 * c))
                total, norm = total + weight * other, norm + unit
            out[image, :, here[0], here[1]] = total / norm
    return out


@pytest.mark.parametrize("kind", ["dot", "softmax", "gaussian"])
@settings(deadline=None, derandomize=True, max_examples=15)
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_an_affinity_is_the_sum_over_all_pairs_of_positions(
    kind: Any, shape: tuple[int, int, int, int], seed: int
) -> None:
    x = maps(shape, seed)
    assert torch.allclose(affinity(kind)(x), double_sum(x, kind), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 20, 4, 5), (2, 21, 4, 5), (1, 40, 1, 1)])
def test_both_orders_of_multiplication_agree(shape: tuple[int, ...]) -> None:
    x = maps(shape, 0)
    flat = x.flatten(2)
    p = flat.shape[2]
    channels_first = torch.einsum("ncp,ndp,ndq->ncq", flat, flat, flat) / p
    positions_first = torch.einsum("ncp,ndp,ndq->ncq", flat, flat, flat.clone()).reshape(x.shape) / p
    assert torch.allclose(dot_product(x), channels_first.reshape(x.shape), rtol=1e-10)
    assert torch.allclose(dot_product(x), positions_first, rtol=1e-10)


def test_the_smaller_product_is_formed_first() -> None:
    sizes: list[int] = []
    original = torch.bmm

    def spy(a: Tensor, b: Tensor) -> Tensor:
        out = original(a, b)
        sizes.append(out.shape[1] * out.shape[2])
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "bmm", spy)
        dot_product(maps((1, 3, 4, 5), 0))
        dot_product(maps((1, 50, 4, 5), 0))
    assert min(sizes[:2]) == 9
    assert min(sizes[2:]) == 400


@settings(deadline=None, derandomize=True, max_examples=30)
@given(shape=SHAPES, seed=st.integers(0, 1000), scale=st.floats(0.01, 30))
def test_normalised_affinities_are_convex_combinations(
    shape: tuple[int, int, int, int], seed: int, scale: float
) -> None:
    x = maps(shape, seed) * scale
    for mixed in (softmax_affinity(x), gaussian_affinity(x)):
        slack = 1e-9 * scale
        assert bool((mixed <= x.amax(dim=(2, 3), keepdim=True) + slack).all())
        assert bool((mixed >= x.amin(dim=(2, 3), keepdim=True) - slack).all())


@pytest.mark.parametrize("kind", ["softmax", "gaussian"])
def test_a_constant_map_is_its_own_average(kind: Any) -> None:
    x = torch.randn(2, 5, 1, 1, dtype=torch.float64).expand(2, 5, 3, 4)
    assert torch.allclose(affinity(kind)(x), x)


def test_the_gaussian_affinity_does_not_depend_on_the_origin() -> None:
    x = maps((2, 5, 3, 4), 0)
    assert torch.allclose(gaussian_affinity(x + 7), gaussian_affinity(x) + 7, atol=1e-9)


@pytest.mark.parametrize("kind", ["dot", "softmax", "gaussian"])
def test_positions_have_no_order(kind: Any) -> None:
    x = maps((2, 5, 3, 4), 0)
    shuffle = torch.randperm(12)

    def permuted(y: Tensor) -> Tensor:
        return y.flatten(2)[:, :, shuffle].reshape(y.shape)

    assert torch.allclose(affinity(kind)(permuted(x)), permuted(affinity(kind)(x)), atol=1e-9)


@pytest.mark.parametrize("kind", ["dot", "softmax", "gaussian"])
def test_images_of_a_batch_do_not_mix(kind: Any) -> None:
    x = maps((3, 4, 3, 3), 0)
    alone = torch.cat([affinity(kind)(image.unsqueeze(0)) for image in x])
    assert torch.allclose(affinity(kind)(x), alone, atol=1e-10)


@pytest.mark.parametrize("kind", ["dot", "softmax", "gaussian"])
def test_a_layer_adds_its_affinity_to_its_input(kind: Any) -> None:
    layer = denoising_layer(kind, 4)
    assert isinstance(layer, NonLocal)
    assert not list(layer.parameters())
    x = maps((2, 4, 3, 3), 0)
    assert torch.allclose(layer(x), x + double_sum(x, kind), atol=1e-9)
    assert affinity(kind).__name__ in repr(layer)


@pytest.mark.parametrize("kind", ["dot", "softmax", "gaussian"])
def test_affinities_have_the_right_gradient(kind: Any) -> None:
    x = maps((1, 3, 2, 2), 0).requires_grad_()
    assert torch.autograd.gradcheck(affinity(kind), (x,))
    wide = maps((1, 6, 2, 2), 0).requires_grad_()
    assert torch.autograd.gradcheck(affinity(kind), (wide,))
    kept = lambda y: affinity(kind)(y, kept=0.5)  # noqa: E731
    assert torch.autograd.gradcheck(kept, (x,))
    assert torch.autograd.gradgradcheck(kept, (x,))


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
def test_between_the_passes_other_kinds_mean_the_dot_product(kind: Any) -> None:
    assert affinity(kind) is dot_product


@pytest.mark.parametrize("kind", ["dot", "softmax", "gaussian"])
def test_channels_last_maps_give_the_same(kind: Any) -> None:
    x = maps((2, 4, 3, 5), 0)
    assert torch.allclose(affinity(kind)(x.contiguous(memory_format=torch.channels_last)), affinity(kind)(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_rows_of_a_map_are_not_copied(layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=layout)
    assert denoise._rows(x).data_ptr() == x.data_ptr()
    assert dot_product(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["dot", "softmax", "gaussian"])
def test_what_is_kept_is_added(kind: Any) -> None:
    x = maps((2, 3, 4, 5), 0)
    assert torch.allclose(affinity(kind)(x, kept=2.0), 2 * x + affinity(kind)(x), atol=1e-12)
