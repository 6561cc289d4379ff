"""Small models and one batch for the tests of training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from robustfpd.models import FPD, Baseline, build, enhance

Batch = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(scope="session")
def _built() -> tuple[FPD, Baseline]:
    fpd = enhance("resnet_mini", num_classes=4, in_channels=1, image_size=8, pyramid_channels=8).train()
    baseline = build(fpd.task, fpd.config.baseline()).train()
    assert isinstance(baseline, Baseline)
    return fpd, baseline


@pytest.fixture
def fpd(_built: tuple[FPD, Baseline]) -> FPD:
    """An FPD of 8×8 images of 4 classes in training mode."""
    return copy.deepcopy(_built[0])


@pytest.fixture
def baseline(_built: tuple[FPD, Baseline]) -> Baseline:
    """The baseline of `fpd`."""
    return copy.deepcopy(_built[1])


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Clean images, the same with noise, and labels."""
    draws = torch.Generator().manual_seed(3)
    clean = torch.rand(6, 1, 8, 8, generator=draws)
    noisy = clean + 0.1 * (2 * torch.rand(clean.shape, generator=draws) - 1)
    return clean, noisy, torch.tensor([0, 1, 2, 3, 0, 1])
