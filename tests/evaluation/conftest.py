from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustfpd.attacks.base import attack as make_attack
from robustfpd.config import Norm
from robustfpd.evaluation import suites
from robustfpd.evaluation.suites import AttackSpec, Suite

Data = tuple[Tensor, Tensor]


class Linear(nn.Module):
    """Two classes by a linear score; records the size of every batch."""

    def __init__(self, weight: Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        score = images.flatten(1) @ self.weight + self.bias
        return torch.stack([-score / 2, score / 2], dim=1)

    def within(self, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        """Which images keep their class all over the L∞ ball and box, in closed form."""
        x, w = images.flatten(1).double(), self.weight.detach().double()
        side = (2 * labels - 1).double()
        against = -side[:, None] * w
        reach = torch.where(against > 0, 1 - x, x).clamp_max(eps)
        return (x @ w + self.bias) * side - (against.abs() * reach).sum(1) > 0


def make_linear() -> Linear:
    """Return a linear classifier of 6×6 images."""
    weight = torch.randn(36, generator=torch.Generator().manual_seed(1))
    return Linear(weight, -0.5 * float(weight.sum()))


def make_data(linear: Linear) -> Data:
    """Return 60 images with pixels at 0 and 1 too; every sixth is misclassified."""
    draws = torch.Generator().manual_seed(2)
    images = (1.2 * torch.rand(60, 1, 6, 6, generator=draws) - 0.1).clamp(0, 1)
    labels = linear(images).argmax(1)
    labels[::6] = 1 - labels[::6]
    linear.batches.clear()
    return images, labels


@pytest.fixture
def linear() -> Linear:
    return make_linear()


@pytest.fixture
def data(linear: Linear) -> Data:
    return make_data(linear)


def install_suite(monkeypatch: pytest.MonkeyPatch, *specs: AttackSpec, probes: int = 0) -> None:
    """Install the suite `ours`."""
    monkeypatch.setitem(suites._SUITES, "ours", Suite(lambda context: list(specs), probes))


def make_spy(function: Any, *, access: Any = "scores") -> Any:
    """Return a function (classifier, images, labels, eps) → images as the attack `square`."""

    def attack(
        classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        out: Tensor = function(classifier, images, labels, eps)
        return out

    return make_attack("square", access=access)(attack)
