"""Small models and one batch for the tests of training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tests.fpds import as_trained, gated
from torch import Tensor

from robustfpd.models import FPD, Baseline, build, enhance

Batch = tuple[Tensor, Tensor, Tensor]


class Recorded:
    """An update that records its arguments and does not step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.only: list[frozenset[str] | None] = []

    def __call__(self, loss: Tensor, *, only: frozenset[str] | None = None, retain_graph: bool = False) -> None:
        self.losses.append(float(loss.detach()))
        self.only.append(only)


@pytest.fixture(scope="session")
def _built() -> dict[str, tuple[FPD, Baseline]]:
    made = {}
    for protocol in ("improved", "corrected"):
        options: dict[str, Any] = {"num_classes": 4, "in_channels": 1, "image_size": 8, "pyramid_channels": 8}
        fpd = as_trained(enhance("resnet_mini", **gated(protocol=protocol, **options))).train()
        baseline = build(fpd.task, fpd.config.baseline()).train()
        assert isinstance(baseline, Baseline)
        made[protocol] = fpd, baseline
    return made


@pytest.fixture(params=["improved", "corrected"])
def protocol(request: pytest.FixtureRequest) -> str:
    """The protocol of `fpd` and `baseline`."""
    return str(request.param)


@pytest.fixture
def fpd(_built: dict[str, tuple[FPD, Baseline]], protocol: str) -> FPD:
    """An FPD of 8×8 images of 4 classes in training mode, with open gates and a restoration that changes images."""
    return copy.deepcopy(_built[protocol][0])


@pytest.fixture
def baseline(_built: dict[str, tuple[FPD, Baseline]], protocol: str) -> Baseline:
    """The baseline of `fpd`."""
    return copy.deepcopy(_built[protocol][1])


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Clean images, the same with noise, and labels."""
    draws = torch.Generator().manual_seed(3)
    clean = torch.rand(6, 1, 8, 8, generator=draws)
    noisy = clean + 0.1 * (2 * torch.rand(clean.shape, generator=draws) - 1)
    return clean, noisy, torch.tensor([0, 1, 2, 3, 0, 1])
