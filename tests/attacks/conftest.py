from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """Logits that are linear in the pixels, and what is known of them in closed form."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        out: Tensor = images.flatten(1) @ self.weight.T + self.bias
        return out


@pytest.fixture
def corners() -> Tensor:
    """Twelve 8×8 images with a fifth of their pixels at exactly 0 and a fifth at exactly 1."""
    draws = torch.Generator().manual_seed(11)
    images = torch.rand(12, 1, 8, 8, generator=draws)
    kind = torch.rand(images.shape, generator=draws)
    return torch.where(kind < 0.2, 0.0, torch.where(kind > 0.8, 1.0, images))


@pytest.fixture
def two_classes() -> Linear:
    weight = torch.randn(2, 64, generator=torch.Generator().manual_seed(12))
    return Linear(weight, torch.tensor([0.5, -0.25]))


@pytest.fixture
def three_classes() -> Linear:
    """Class 2 is never in reach, so the margin of class 0 is that against class 1 all over the box."""
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(13))
    return Linear(weight, torch.tensor([0.0, 0.0, -200.0]))


@pytest.fixture
def net() -> nn.Module:
    """A smooth network of three classes with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(14)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 3))
