from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from robustfpd.training.objectives import OBJECTIVES, divergence, madry, mart, trades

CLEAN = torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 3.0]])
ADVERSARIAL = torch.tensor([[0.5, 1.5, 0.0], [1.0, -0.5, 1.0]])
LABELS = torch.tensor([0, 2])


def _softmax(row: Tensor) -> list[float]:
    exponentials = [math.exp(v) for v in row.tolist()]
    return [e / sum(exponentials) for e in exponentials]


P = [_softmax(row) for row in CLEAN]
Q = [_softmax(row) for row in ADVERSARIAL]
KL = [sum(p * math.log(p / q) for p, q in zip(a, b, strict=True)) for a, b in zip(P, Q, strict=True)]
Y = LABELS.tolist()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_madry_is_the_cross_entropy_of_the_adversarial_images() -> None:
    expected = _mean([-math.log(q[y]) for q, y in zip(Q, Y, strict=True)])
    assert float(madry(CLEAN, ADVERSARIAL, LABELS, beta=9.0)) == pytest.approx(expected, rel=1e-5)


def test_trades_adds_the_divergence_to_the_clean_cross_entropy() -> None:
    expected = _mean([-math.log(p[y]) for p, y in zip(P, Y, strict=True)]) + 6 * _mean(KL)
    assert float(trades(CLEAN, ADVERSARIAL, LABELS, beta=6.0)) == pytest.approx(expected, rel=1e-5)


def test_mart_weighs_the_divergence_by_the_clean_error() -> None:
    wrong = [max(v for k, v in enumerate(q) if k != y) for q, y in zip(Q, Y, strict=True)]
    boosted = [-math.log(q[y]) - math.log(1 - w) for q, y, w in zip(Q, Y, wrong, strict=True)]
    weighed = [kl * (1 - p[y]) for kl, p, y in zip(KL, P, Y, strict=True)]
    expected = _mean(boosted) + 5 * _mean(weighed)
    assert float(mart(CLEAN, ADVERSARIAL, LABELS, beta=5.0)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_objectives_are_finite_and_have_gradients_at_extreme_logits(name: str) -> None:
    clean = torch.tensor([[300.0, -300.0, 0.0]], requires_grad=True)
    adversarial = torch.tensor([[-300.0, 300.0, 0.0]], requires_grad=True)
    loss = OBJECTIVES[name](clean, adversarial, torch.tensor([0]), 6.0)  # type: ignore[index]
    (gradient,) = torch.autograd.grad(loss, adversarial)
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) > 0.1


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_label_smoothing_moves_the_minimum_from_infinite_logits(name: str) -> None:
    logits = torch.tensor([[50.0, 0.0, 0.0]])
    labels = torch.tensor([0])
    plain, smoothed = (float(OBJECTIVES[name](logits, logits, labels, 1.0, s)) for s in (0.0, 0.3))  # type: ignore[index]
    assert plain == pytest.approx(0, abs=1e-4)
    assert smoothed == pytest.approx(0.3 * 2 / 3 * 50, rel=1e-3)


@given(st.lists(st.floats(-20, 20), min_size=6, max_size=6))
def test_the_divergence_is_positive_and_zero_between_equal_probabilities(values: list[float]) -> None:
    p, q = torch.tensor(values).double().reshape(2, 1, 3)
    assert float(divergence(p, q)) >= -1e-9
    assert float(divergence(p, p + 7.0)) == pytest.approx(0, abs=1e-9)
