from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fpds import effective_weight
from torch import Tensor, nn

from robustfpd.errors import InputError
from robustfpd.models.heads import (
    Spectral,
    classification_layer,
    spectral_norm,
)

KINDS = ["tanh", "spectral", "orthogonal", "linear"]
SIZES = [(7, 4), (4, 7), (5, 5), (16, 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("channels", "num_classes"), SIZES)
@pytest.mark.parametrize("bound", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_the_stated_constant_bounds_every_slope(
    kind: Any, channels: int, num_classes: int, bound: float, scale: float
) -> None:
    head = classification_layer(kind, channels, num_classes, bound)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(scale)
    a = torch.randn(500, channels)
    b = a + torch.randn(500, channels) * torch.logspace(-2, 2, 500).unsqueeze(1)
    slopes = (head(a) - head(b)).norm(dim=1) / (a - b).norm(dim=1)
    assert slopes.max().item() <= head.lipschitz() * (1 + 1e-3)
    largest = float(torch.linalg.svdvals(effective_weight(head))[0])
    assert largest <= head.lipschitz() * (1 + 1e-4)


@pytest.mark.parametrize(("channels", "num_classes"), SIZES)
@pytest.mark.parametrize("kind", ["linear", "tanh"])
def test_the_constant_of_a_free_head_is_its_largest_singular_value(kind: Any, channels: int, num_classes: int) -> None:
    head = classification_layer(kind, channels, num_classes)
    assert head.lipschitz() == pytest.approx(float(torch.linalg.svdvals(effective_weight(head))[0]), rel=1e-4)


@pytest.mark.parametrize(("channels", "num_classes"), SIZES)
@pytest.mark.parametrize("bound", [0.3, 2.0])
def test_every_singular_value_of_the_orthogonal_head_is_the_bound(
    channels: int, num_classes: int, bound: float
) -> None:
    head = classification_layer("orthogonal", channels, num_classes, bound)
    values = torch.linalg.svdvals(effective_weight(head))
    assert torch.allclose(values, torch.full_like(values, bound), rtol=1e-4)


@pytest.mark.parametrize("kind", ["spectral", "orthogonal"])
@pytest.mark.parametrize("bound", [0.2, 1.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_bound_holds_after_training_steps_that_pull_against_it(
    kind: Any, bound: float, weight_decay: float
) -> None:
    head = classification_layer(kind, 8, 3, bound)
    before = effective_weight(head)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0, weight_decay=weight_decay)
    features = torch.randn(32, 8)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(features) * 10, features[:, :3].argmax(1)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = effective_weight(head)
    assert not torch.allclose(before, after)
    values = torch.linalg.svdvals(after)
    assert float(values[0]) <= bound * (1 + 1e-4)
    if kind == "orthogonal":
        assert torch.allclose(values, torch.full_like(values, bound), rtol=1e-3)


def test_weights_under_the_bound_stay_as_they_are() -> None:
    head = Spectral(nn.Linear(6, 3), bound=2.0)
    weight = torch.randn(3, 6)
    weight = weight / torch.linalg.svdvals(weight)[0]
    (raw,) = (p for p in head.parameters() if p.shape == weight.shape)
    for length, kept in ((0.5, 0.5), (1.9, 1.9), (3, 2), (100, 2)):
        with torch.no_grad():
            raw.copy_(weight * length)
        assert torch.allclose(effective_weight(head), weight * kept, atol=1e-5)


def test_only_the_tanh_head_squashes() -> None:
    features = torch.randn(50, 6) * 20
    for kind in KINDS:
        head = classification_layer(kind, 6, 3)  # type: ignore[arg-type]
        plain = head.pre_squash(features)
        if kind == "tanh":
            assert torch.equal(head(features), plain.tanh())
            assert float(head(features).detach().abs().max()) <= 1
            assert float(plain.detach().abs().max()) > 1
        else:
            assert torch.equal(head(features), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_every_head_has_a_bias_and_trains(kind: Any) -> None:
    head = classification_layer(kind, 6, 3)
    head(torch.randn(4, 6)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in head.parameters())
    assert (3,) in {tuple(p.shape) for p in head.parameters()}


@settings(deadline=None, derandomize=True, max_examples=30)
@given(rows=st.integers(1, 8), columns=st.integers(1, 8), seed=st.integers(0, 1000))
def test_the_spectral_norm_and_its_gradient_are_those_of_torch(rows: int, columns: int, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draws, dtype=torch.float64).requires_grad_()
    ours, theirs = spectral_norm(weight), torch.linalg.matrix_norm(weight, ord=2)
    assert torch.allclose(ours, theirs, rtol=1e-9)
    (gradient,) = torch.autograd.grad(ours, weight)
    (expected,) = torch.autograd.grad(theirs, weight)
    assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-8)


def test_a_zero_matrix_gives_finite_gradients() -> None:
    head = Spectral(nn.Linear(6, 3), bound=1.0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    head(torch.randn(4, 6)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in head.parameters())


def test_an_unknown_head_names_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown head 'tan'; did you mean 'tanh'"):
        classification_layer("tan", 4, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(("channels", "num_classes"), SIZES)
def test_the_orthogonal_head_moves_little_when_its_weights_do(channels: int, num_classes: int) -> None:
    """A QR decomposition may turn a whole row's sign where one entry passes zero; training would not see it."""
    head = classification_layer("orthogonal", channels, num_classes, 1.0)
    raw = head.linear.parametrizations.weight.original  # type: ignore[union-attr]
    assert isinstance(raw, Tensor)
    found = []
    for value in (1e-4, -1e-4):
        with torch.no_grad():
            raw[0, 0] = value
        found.append(effective_weight(head))
    assert float((found[0] - found[1]).abs().max()) < 0.01
