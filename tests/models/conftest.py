"""Networks and settings that the models' tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fpds import as_trained, gated
from torch import Tensor, nn

import robustfpd as rf

MINI: dict[str, Any] = {"num_classes": 4, "in_channels": 1, "image_size": 16}


def fresh(**options: Any) -> rf.FPD:
    """A new FPD, which under the protocol `improved` has gates and computes what its backbone computes."""
    return rf.enhance("resnet_mini", **gated(**{**MINI, **options}))


def mini(**options: Any) -> rf.FPD:
    """An FPD whose gates are open and whose restoration changes the images."""
    return as_trained(fresh(**options))


class Chain(nn.Module):
    """Three small stages behind a stem, a classifier behind them: a user's own network."""

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=False))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.stem(x)))
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def chain() -> nn.Module:
    return Chain()


@pytest.fixture
def chain_stages() -> tuple[str, ...]:
    return ("stem", "first", "second")


SHARED = Path(__file__).parents[3] / "shared"


@pytest.fixture(params=["resnet_mnist_1-1-1-1", "resnext_svhn_1-1-1-1"])
def published_folder(request: pytest.FixtureRequest) -> Path:
    """Folder with a checkpoint in the authors' format and what it gives; the test is skipped where it is absent."""
    folder = SHARED / "published" / str(request.param)
    if not folder.is_dir():
        pytest.skip("no published checkpoints beside the project")
    return folder
