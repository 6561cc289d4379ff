from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustfpd.config import OptimizerConfig, RunConfig, TrainingConfig, parse
from robustfpd.errors import InputError
from robustfpd.models import FPD, Baseline, build, enhance
from robustfpd.training.optim import make_optimizer
from robustfpd.training.stepping import leave_out
from robustfpd.training.steps import GROUPS, Update, baseline_step, parameter_groups, two_phase_step


def _model() -> FPD:
    return enhance("resnet_mini", num_classes=4, in_channels=1, image_size=8, pyramid_channels=8).train()


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(3)
    clean = torch.rand(6, 1, 8, 8, generator=draws)
    noisy = clean + 0.1 * (2 * torch.rand(clean.shape, generator=draws) - 1)
    return clean, noisy, torch.tensor([0, 1, 2, 3, 0, 1])


def _updating(model: FPD | Baseline, optimizer: torch.optim.Optimizer, losses: list[float]) -> Update:
    def update(loss: Tensor, *, only: frozenset[str] | None = None, keep_graph: bool = False) -> None:
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward(retain_graph=keep_graph)  # type: ignore[no-untyped-call]
        if only is not None:
            leave_out(optimizer, only)
        optimizer.step()

    return update


@pytest.mark.parametrize("name", ["adam", "adamax", "adamw", "sgd"])
def test_a_shut_gate_leaves_the_head_byte_identical_and_moves_front_and_restoration(name: str) -> None:
    model = _model()
    optimizer = make_optimizer(parameter_groups(model), parse(OptimizerConfig, {"name": name, "weight_decay": 0.1}))
    clean, noisy, labels = _batch()
    # An open step first, so that momentum and moments of the head exist and could move it.
    two_phase_step(TrainingConfig(threshold=1e9))(model, clean, noisy, labels, _updating(model, optimizer, []))
    before = {k: v.clone() for k, v in model.named_parameters()}
    losses: list[float] = []
    result = two_phase_step(TrainingConfig(threshold=0.0))(
        model, clean, noisy, labels, _updating(model, optimizer, losses)
    )
    assert not result.gate_open
    assert len(losses) == 1
    moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    head = {k for k in before if k.startswith("head.")}
    assert head
    assert not moved & head
    assert moved == set(before) - head


def test_a_shut_gate_steps_on_the_weighted_restoration_loss_alone() -> None:
    model = _model()
    clean, noisy, labels = _batch()
    expected = 0.5 * F.mse_loss(copy.deepcopy(model)(noisy).restored, clean)
    losses: list[float] = []
    config = TrainingConfig(threshold=0.0, alpha_restore=0.5)
    two_phase_step(config)(model, clean, noisy, labels, lambda loss, **_: losses.append(float(loss.detach())))
    assert losses == pytest.approx([float(expected.detach())])


def test_an_open_gate_steps_on_both_phases_in_turn() -> None:
    model = _model()
    clean, noisy, labels = _batch()
    config = TrainingConfig(threshold=1e9, alpha_ce=0.7, alpha_restore=0.3, alpha_restore_second=0.2)
    first = copy.deepcopy(model)(noisy)
    loss1 = 0.7 * F.cross_entropy(first.logits, labels) + 0.3 * F.mse_loss(first.restored, clean)
    twice = copy.deepcopy(model)
    twice(noisy)  # batch norm has seen the first phase
    second = twice(first.restored.detach())
    loss2 = 0.7 * F.cross_entropy(second.logits, labels) + 0.2 * F.mse_loss(second.restored, clean)
    losses: list[float] = []
    result = two_phase_step(config)(model, clean, noisy, labels, lambda loss, **_: losses.append(float(loss.detach())))
    assert result.gate_open
    assert losses == pytest.approx([float(loss1.detach()), float(loss2.detach())], rel=1e-5)


def test_the_second_phase_stops_at_the_restored_image_unless_joint() -> None:
    clean, noisy, labels = _batch()
    gradients: dict[str, list[Tensor]] = {}
    for mode in ("detached", "joint"):
        model = _model()
        config = parse(TrainingConfig, {"threshold": 1e9, "second_pass": mode})
        collected: list[Tensor] = []

        def backward(loss: Tensor, model: FPD = model, collected: list[Tensor] = collected, **_: object) -> None:
            loss.backward()  # type: ignore[no-untyped-call]
            weight = model.decoder.laterals[0].weight
            assert isinstance(weight, Tensor)
            assert weight.grad is not None
            collected.append(weight.grad.clone())

        two_phase_step(config)(model, clean, noisy, labels, backward)
        gradients[mode] = collected
    assert [len(gradients[m]) for m in ("detached", "joint")] == [2, 1]
    # Without the cut the second phase also pulls on the first restoration; the sum of both phases differs.
    assert not torch.allclose(gradients["detached"][-1], gradients["joint"][-1], rtol=1e-3)


def test_joint_is_the_sum_of_both_phases() -> None:
    model = _model()
    clean, noisy, labels = _batch()
    baseline = copy.deepcopy(model)
    first = baseline(noisy)
    second = baseline(first.restored)
    expected = sum(F.cross_entropy(o.logits, labels) + F.mse_loss(o.restored, clean) for o in (first, second))
    losses: list[float] = []
    two_phase_step(TrainingConfig(threshold=1e9, second_pass="joint"))(
        model, clean, noisy, labels, lambda loss, **_: losses.append(float(loss.detach()))
    )
    assert losses == pytest.approx([float(torch.as_tensor(expected).detach())], rel=1e-5)


def _gradients(model: FPD, config: TrainingConfig) -> list[Tensor]:
    clean, noisy, labels = _batch()
    two_phase_step(config)(model, clean, noisy, labels, lambda loss, **_: loss.backward())
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_a_shared_back_pass_is_the_second_front_pass_where_nothing_stands_between() -> None:
    model = _model()
    joint = TrainingConfig(threshold=1e9, second_pass="joint")
    shared = TrainingConfig(threshold=1e9, second_pass="shared")
    for middle, alike in (("none", True), ("input", False)):
        model.config = model.config.model_copy(update={"middle": middle})
        expected, found = (_gradients(copy.deepcopy(model), config) for config in (joint, shared))
        assert len(found) == len(expected) > 0
        apart = [float((a - b).abs().max() / (a.abs().max() + 1)) for a, b in zip(expected, found, strict=True)]
        same = max(apart) < 1e-4
        assert same is alike


@pytest.mark.parametrize("mode", ["detached", "joint", "shared"])
def test_a_shared_back_pass_saves_one_of_four_passes(mode: Literal["detached", "joint", "shared"]) -> None:
    model, passes = _model(), [0]
    model.backbone.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    _gradients(model, TrainingConfig(threshold=1e9, second_pass=mode))
    assert passes[0] == (3 if mode == "shared" else 4)


def test_phase_two_follows_every_so_many_batches() -> None:
    model, losses = _model(), list[int]()
    clean, noisy, labels = _batch()
    step = two_phase_step(TrainingConfig(threshold=1e9, second_pass_interval=3))
    for index in range(5):
        steps: list[float] = []
        result = step(
            model, clean, noisy, labels, lambda loss, steps=steps, **_: steps.append(float(loss.detach())), index
        )
        losses.append(len(steps))
        assert (result.second_ce is None) == (len(steps) == 1)
    assert losses == [2, 1, 1, 2, 1]


def test_the_twin_takes_as_many_steps_as_phase_two_makes() -> None:
    def epochs(**training: Any) -> int:
        return parse(RunConfig, {"training": {"epochs": 12, **training}}).baseline().training.epochs

    assert [epochs(), epochs(second_pass_interval=3), epochs(second_pass="joint"), epochs(second_pass="shared")] == [
        24, 16, 12, 12,
    ]  # fmt: skip


def test_maps_of_another_kind_cannot_be_shared() -> None:
    with pytest.raises(InputError, match=r"needs model\.pyramid_reads=denoised"):
        parse(RunConfig, {"training": {"second_pass": "shared"}, "model": {"pyramid_reads": "raw"}})


def test_parameter_groups_tell_pyramid_upscaling_and_head_apart() -> None:
    model = _model()
    groups = {group["name"]: {id(p) for p in group["params"]} for group in parameter_groups(model)}
    assert tuple(groups) == GROUPS
    assert groups["head"] == {id(p) for p in model.head.parameters()}
    assert groups["upscaling"] == {id(p) for p in model.decoder.upscale.parameters()}
    assert groups["front_and_pyramid"] >= {id(p) for p in model.decoder.laterals.parameters()}
    everything = [i for members in groups.values() for i in members]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    baseline = build(model.task, model.config.baseline())
    assert [group["name"] for group in parameter_groups(baseline)] == ["front_and_pyramid", "head"]


def test_the_twin_steps_once_on_the_cross_entropy_of_noisy_images() -> None:
    fpd = _model()
    baseline = build(fpd.task, fpd.config.baseline()).train()
    clean, noisy, labels = _batch()
    expected = F.cross_entropy(copy.deepcopy(baseline)(noisy), labels)
    losses: list[float] = []
    result = baseline_step(TrainingConfig())(
        baseline, clean, noisy, labels, lambda loss, **_: losses.append(float(loss.detach()))
    )
    assert losses == pytest.approx([float(expected.detach())])
    assert result.restoration is None
