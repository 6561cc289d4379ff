"""The published update rule, asserted term by term on a fixed batch.

The reference below steps weights through `.data`, which autograd does not notice: that is how torch behaved when the
authors' code ran. Their optimiser for the shut gate held the transposed convolutions alone.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn

from robustfpd.config import RunConfig, TaskConfig, parse, recipe, recipe_names
from robustfpd.data.transforms import add_uniform_noise
from robustfpd.models import FPD, build
from robustfpd.training.fabric import FabricUpdate
from robustfpd.training.optim import make_optimizer, parameter_groups
from robustfpd.training.steps import restoration_unit, two_phase_step

LR, CLIP = 0.05, 5.0


def _published(threshold: float) -> RunConfig:
    """A published full-size recipe, with a network that fits a test and an optimiser that can be done by hand."""
    words = [f"training.threshold={threshold}", "model.backbone=resnet_mini", "model.stages=null",
             "model.pyramid_channels=8", "model.dropout=0", f"training.optimizer.lr={LR}",
             "training.optimizer.name=sgd", "training.optimizer.momentum=0"]  # fmt: skip
    return recipe("svhn/resnet50", words, protocol="published")


def _setting(threshold: float) -> tuple[RunConfig, FPD, Tensor, Tensor, Tensor]:
    config = _published(threshold)
    task = {"num_classes": 4, "in_channels": 3, "image_size": (16, 16)}
    model = build(parse(TaskConfig, task), config.model, seed=1).train()
    assert isinstance(model, FPD)
    draws = torch.Generator().manual_seed(3)
    clean = torch.rand(6, 3, 16, 16, generator=draws)
    noisy = clean + 0.01 * (2 * torch.rand(clean.shape, generator=draws) - 1)
    return config, model, clean, noisy, torch.tensor([0, 1, 2, 3, 0, 1])


def _ours(config: RunConfig, model: FPD, clean: Tensor, noisy: Tensor, labels: Tensor) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    optimizer = make_optimizer(parameter_groups(model), config.training.optimizer)
    wrapped, optimizer = fabric.setup(model, optimizer)
    update = FabricUpdate(fabric, wrapped, optimizer, config.training.clip_grad_norm)
    two_phase_step(wrapped, clean, noisy, labels, update, config.training)


def _step(model: nn.Module, stepped: list[nn.Parameter]) -> None:
    """Clip the gradient of all parameters, then step some of them by plain gradient descent, unnoticed by autograd."""
    with_gradients = [p for p in model.parameters() if p.grad is not None]
    torch.nn.utils.clip_grad_norm_(with_gradients, CLIP)
    for p in stepped:
        if p.grad is not None:
            p.data.add_(p.grad, alpha=-LR)
    for p in model.parameters():
        p.grad = None


def test_every_full_size_recipe_has_the_published_rule() -> None:
    full = [name for name in recipe_names() if not name.endswith(("/mini", "/robust"))]
    assert len(full) == 6
    for name in full:
        corrected, published = recipe(name, protocol="corrected"), recipe(name, protocol="published")
        rule = (published.training.gate_trains, published.training.second_pass, published.data.selection)
        assert rule == ("upscaling", "through", "test")
        assert published.training.schedule.follows == "loss"
        rule = (corrected.training.gate_trains, corrected.training.second_pass, corrected.data.selection)
        assert rule == ("front_and_restoration", "detached", "held_out")


def test_behind_the_shut_gate_only_the_transposed_convolutions_step_on_the_restoration_loss() -> None:
    config, model, clean, noisy, labels = _setting(threshold=0.0)
    assert config.training.clip_grad_norm == CLIP
    before = copy.deepcopy(model.state_dict())
    reference = copy.deepcopy(model)
    F.mse_loss(reference(noisy).restored, clean).backward()  # type: ignore[no-untyped-call]
    _step(reference, list(reference.decoder.upscale.parameters()))
    _ours(config, model, clean, noisy, labels)
    moved = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    assert moved == {f"decoder.upscale.{k}" for k, _ in model.decoder.upscale.named_parameters()}
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6), name


def test_behind_the_open_gate_both_phases_step_and_the_second_goes_through_the_first() -> None:
    config, model, clean, noisy, labels = _setting(threshold=1e9)
    reference, detached = copy.deepcopy(model), copy.deepcopy(model)
    first = reference(noisy)
    loss = F.cross_entropy(first.logits, labels) + F.mse_loss(first.restored, clean)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    _step(reference, list(reference.parameters()))
    again = reference(first.restored)
    second = F.cross_entropy(again.logits, labels) + F.mse_loss(again.restored, clean)
    second.backward()  # type: ignore[no-untyped-call]
    _step(reference, list(reference.parameters()))
    _ours(config, model, clean, noisy, labels)
    for (name, ours), theirs in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.allclose(ours, theirs[1], atol=1e-5), name
    # The corrected rule, which stops the gradient, lands elsewhere: the test above could fail.
    corrected = config.training.model_copy(update={"second_pass": "detached"})
    _ours(config.model_copy(update={"training": corrected}), detached, clean, noisy, labels)
    gap = max(
        float((a - b).detach().abs().max()) for a, b in zip(model.parameters(), detached.parameters(), strict=True)
    )
    assert gap > 1e-4


def test_normalised_space_measures_noise_and_loss_in_standard_deviations() -> None:
    config = recipe("caltech101/resnet101", protocol="published").training
    assert config.space == "normalised"
    model = _setting(0.0)[1]
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
    model.std = std
    unit = restoration_unit(model, config)
    assert isinstance(unit, Tensor)
    assert torch.equal(unit, std)
    clean = torch.full((4, 3, 16, 16), 0.5)
    noisy = add_uniform_noise(clean, config.noise, torch.Generator().manual_seed(0), unit)
    widest = (noisy - clean).abs().amax(dim=(0, 2, 3))
    assert widest.tolist() == pytest.approx([0.03 * 0.229, 0.03 * 0.224, 0.03 * 0.225], rel=0.02)
    losses: list[float] = []
    shut = config.model_copy(update={"threshold": 0.0})
    expected = F.mse_loss(copy.deepcopy(model)(noisy).restored / std, clean / std)
    labels = torch.zeros(4).long()
    two_phase_step(model, clean, noisy, labels, lambda loss, **_: losses.append(float(loss.detach())), shut)
    assert losses == pytest.approx([float(expected.detach())], rel=1e-5)
