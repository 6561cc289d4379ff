"""The gate, the units of the losses, and the first losses of every recipe."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.fpds import corrected_training
from tests.training.conftest import Recorded

from robustfpd import data
from robustfpd.config import TaskConfig, TrainingConfig, parse, recipe, recipe_names
from robustfpd.models import FPD, build, enhance
from robustfpd.training.optim import OptimizerUpdate, make_optimizer, parameter_groups
from robustfpd.training.perturbations import noisy_images
from robustfpd.training.steps import gate_opens, restoration_unit, two_phase_step


def test_a_relative_threshold_is_a_fraction_of_the_loss_of_the_best_constant_image() -> None:
    draws = torch.Generator().manual_seed(0)
    clean = torch.rand(5, 3, 4, 4, generator=draws) * torch.tensor([1.0, 0.5, 0.1]).reshape(3, 1, 1)
    constant = clean.mean(dim=(0, 2, 3), keepdim=True).expand_as(clean)
    for unit in (1.0, 0.2, torch.tensor([0.2, 0.3, 0.4]).reshape(1, 3, 1, 1)):
        loss = F.mse_loss(constant / unit, clean / unit)
        for threshold in (0.1, 0.5, 1.0):
            config = TrainingConfig(threshold=threshold)
            assert gate_opens(0.999 * threshold * loss, clean, config, unit)
            assert not gate_opens(1.001 * threshold * loss, clean, config, unit)


def test_an_absolute_threshold_does_not_depend_on_the_images() -> None:
    config = corrected_training(threshold=0.5)
    for clean in (torch.zeros(2, 1, 4, 4), torch.rand(2, 1, 4, 4)):
        assert gate_opens(torch.tensor(0.5), clean, config)
        assert not gate_opens(torch.tensor(0.501), clean, config)


def test_the_gate_of_a_batch_of_equal_images_opens_for_a_perfect_restoration_alone() -> None:
    clean = torch.full((2, 1, 4, 4), 0.3)
    assert gate_opens(torch.tensor(0.0), clean, TrainingConfig())
    assert not gate_opens(torch.tensor(1e-3), clean, TrainingConfig())


def test_images_that_keep_the_noise_have_a_restoration_loss_of_one() -> None:
    model = enhance("resnet_mini", num_classes=4, in_channels=1, image_size=16, std=(0.5,)).train()
    draws = torch.Generator().manual_seed(0)
    clean, labels = torch.rand(32, 1, 16, 16, generator=draws), torch.arange(32) % 4
    for space in ("pixels", "normalised"):
        config = parse(TrainingConfig, {"noise": 0.2, "space": space})
        noisy = noisy_images(model, clean, config, draws)
        result = two_phase_step(model, clean, noisy, labels, Recorded(), config, 0, draws)
        assert result.first.restoration is not None
        assert float(result.first.restoration) == pytest.approx(1, rel=0.03)


STAND_INS = {"resnet50": "published_resnet_1_1_1_1", "resnet101": "published_resnet_1_1_1_1",
             "published_resnext_3_4_6_3": "published_resnext_1_1_1_1"}  # fmt: skip


def _first_losses(name: str, backbone: str, images: int, size: tuple[int, int] | None = None) -> list[float]:
    """Return the losses of both phases of a recipe's first step on random images, and the noise's restoration loss."""
    run = recipe(name, [f"model.backbone={backbone}"])
    described = data.info(run.data.dataset)
    values = {
        "num_classes": described.num_classes or 4, "in_channels": run.data.channels or described.in_channels,
        "image_size": size or run.data.image_size or described.image_size,
    }  # fmt: skip
    task = parse(TaskConfig, values)
    model = build(task, run.model).train()
    assert isinstance(model, FPD)
    draws = torch.Generator().manual_seed(0)
    clean = torch.rand(images, task.in_channels, *task.image_size, generator=draws)
    noisy = noisy_images(model, clean, run.training, draws)
    update = OptimizerUpdate(make_optimizer(parameter_groups(model), run.training.optimizer), 10.0)
    result = two_phase_step(model, clean, noisy, torch.arange(images) % 2, update, run.training, 0, draws)
    assert result.gate_open
    assert result.second is not None
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    noise = ((noisy - clean) / restoration_unit(model, run.training)).square().mean()
    losses = (result.first.restoration, noise, result.second.restoration, result.first.ce, result.second.ce)
    return [float(loss) for loss in losses if loss is not None]


@pytest.mark.parametrize("name", [name for name in recipe_names() if recipe(name).stage == "two-phase"])
@pytest.mark.parametrize("deep", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_recipes_first_losses_are_small(name: str, deep: bool) -> None:
    """Networks of one block a stage stand for the deep ones; the restoration starts as the noise."""
    backbone = recipe(name).model.backbone
    if deep or backbone == "resnet_mini":
        first, noise, second, *entropies = _first_losses(name, backbone, 2)
    else:
        first, noise, second, *entropies = _first_losses(name, STAND_INS[backbone], 2, (64, 64))
    assert first == pytest.approx(noise, rel=0.1)
    assert 0 < second < 10
    assert all(0 < entropy < 30 for entropy in entropies)
