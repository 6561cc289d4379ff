from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustfpd.attacks.losses import cross_entropy, dlr, loss_function, margin, targeted_dlr
from robustfpd.errors import InputError


def _logits(seed: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, classes, generator=draws).double()
    labels = torch.randint(classes, (7,), generator=draws)
    targets = (labels + torch.randint(1, classes, (7,), generator=draws)) % classes
    return logits, labels, targets


def test_closed_values() -> None:
    logits, labels = torch.tensor([[4.0, 1.0, 2.0, -4.0], [1.0, 3.0, 2.0, 0.0]]), torch.tensor([0, 0])
    assert margin(logits, labels).tolist() == [-2, 2]
    # (2 - 4) / (4 - 1); (3 - 1) / (3 - 1)
    torch.testing.assert_close(dlr(logits, labels), torch.tensor([-2 / 3, 1.0]))
    targets = torch.tensor([1, 3])
    # (1 - 4) / (4 - (1 - 4)/2); (0 - 1) / (3 - (1 + 0)/2)
    torch.testing.assert_close(targeted_dlr(logits, labels, targets), torch.tensor([-3 / 5.5, -1 / 2.5]))
    e = [math.exp(v) for v in (4, 1, 2, -4)]
    assert float(cross_entropy(logits, labels)[0]) == pytest.approx(-math.log(e[0] / sum(e)), rel=1e-5)


def test_two_and_three_classes() -> None:
    two, labels = torch.tensor([[1.0, 3.0], [5.0, 2.0]]), torch.tensor([0, 0])
    assert dlr(two, labels).tolist() == margin(two, labels).tolist() == [2, -3]
    assert targeted_dlr(two, labels, 1 - labels).tolist() == [2, -3]
    three = torch.tensor([[5.0, 3.0, 1.0], [1.0, 4.0, 2.0]])
    torch.testing.assert_close(dlr(three, labels), torch.tensor([-0.5, 1.0]))
    torch.testing.assert_close(targeted_dlr(three, labels, torch.tensor([1, 1])), torch.tensor([-2 / 3, 1.2]))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seed=st.integers(0, 2**31), classes=st.integers(3, 12), shift=st.floats(-1e3, 1e3), scale=st.floats(1e-3, 1e3))
def test_dlr_is_invariant_to_shift_and_scale(seed: int, classes: int, shift: float, scale: float) -> None:
    logits, labels, targets = _logits(seed, classes)
    moved = scale * logits + shift
    torch.testing.assert_close(dlr(moved, labels), dlr(logits, labels), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        targeted_dlr(moved, labels, targets), targeted_dlr(logits, labels, targets), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(margin(moved, labels), scale * margin(logits, labels), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        cross_entropy(logits + shift, labels), cross_entropy(logits, labels), rtol=1e-6, atol=1e-6
    )  # fmt: skip


@settings(deadline=None, derandomize=True, max_examples=60)
@given(seed=st.integers(0, 2**31), classes=st.integers(2, 12))
def test_losses_are_positive_exactly_where_the_image_is_misclassified(seed: int, classes: int) -> None:
    logits, labels, targets = _logits(seed, classes)
    wrong = logits.argmax(1) != labels
    assert torch.equal(margin(logits, labels) > 0, wrong)
    assert torch.equal(dlr(logits, labels) > 0, wrong)
    ahead = logits.gather(1, targets[:, None]) > logits.gather(1, labels[:, None])
    assert torch.equal(targeted_dlr(logits, labels, targets) > 0, ahead.squeeze(1))
    if classes > 2:
        assert bool((dlr(logits, labels) >= -1 - 1e-9).all())
    assert dlr(logits, labels).shape == cross_entropy(logits, labels).shape == (7,)


@pytest.mark.parametrize("loss", [margin, dlr, cross_entropy])
def test_equal_logits_give_finite_losses_and_gradients(loss: Any) -> None:
    logits = torch.ones(2, 4, requires_grad=True)
    values = loss(logits, torch.tensor([0, 3]))
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert bool(values.isfinite().all())
    assert bool(gradient.isfinite().all())


def test_loss_function_returns_a_loss_by_name_or_the_function() -> None:
    assert loss_function("ce") is cross_entropy
    assert loss_function("margin") is margin
    assert loss_function("dlr") is dlr

    def own(logits: Tensor, labels: Tensor) -> Tensor:
        return logits[:, 0]

    assert loss_function(own) is own
    with pytest.raises(InputError, match="unknown loss 'hinge'; choose from ce, dlr, margin"):
        loss_function("hinge")  # type: ignore[arg-type]
