from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.fpds import corrected_training
from tests.training.conftest import Batch, Recorded
from torch import Tensor

from robustfpd.config import (
    AdversarialConfig,
    OptimizerConfig,
    TrainingConfig,
    parse,
)
from robustfpd.errors import InputError
from robustfpd.models import FPD, Baseline
from robustfpd.training.adversarial_step import adversarial_step
from robustfpd.training.optim import OptimizerUpdate, make_optimizer, parameter_groups
from robustfpd.training.steps import (
    backbone_step,
    baseline_step,
    two_phase_step,
)

OPEN = corrected_training(threshold=1e9)
SHUT = corrected_training(threshold=0.0)


def _loss(model: FPD, images: Tensor, target: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
    out = model(images)
    return F.cross_entropy(out.logits, labels) + F.mse_loss(scale * out.restored, target)


def _approx(*losses: Tensor) -> Any:
    return pytest.approx([float(loss.detach()) for loss in losses], rel=1e-4)


# Two-phase step


@pytest.mark.parametrize("name", ["adam", "adamax", "adamw", "sgd"])
def test_a_shut_gate_leaves_the_head_byte_identical_and_steps_front_and_restoration(
    fpd: FPD, batch: Batch, name: str, protocol: str
) -> None:
    optimizer = make_optimizer(parameter_groups(fpd), parse(OptimizerConfig, {"name": name, "weight_decay": 0.1}))
    update = OptimizerUpdate(optimizer)
    # An open step first, so that momentum and moments of the head exist and could move it.
    assert two_phase_step(fpd, *batch, update, OPEN).gate_open
    before = {k: v.clone() for k, v in fpd.named_parameters()}
    assert not two_phase_step(fpd, *batch, update, SHUT).gate_open
    moved = {k for k, v in fpd.named_parameters() if not torch.equal(v, before[k])}
    head = {k for k in before if k.startswith("head.")}
    assert head
    if protocol == "improved":  # the front pass runs the stem and one stage
        front = ("backbone.net.conv1.", "backbone.net.bn1.", "backbone.net.layer1.", "backbone.inserted.", "decoder.")
        assert moved == {k for k in before if k.startswith(front)}
        assert not moved & head
    else:
        assert moved == set(before) - head


@pytest.mark.parametrize("name", ["adam", "adamax", "adamw", "sgd"])
def test_parameters_that_learn_later_than_others_of_their_group_start_then(fpd: FPD, batch: Batch, name: str) -> None:
    """The backbone alone, then behind the shut gate the front pass and the restoration, then everything."""
    optimizer = make_optimizer(parameter_groups(fpd), parse(OptimizerConfig, {"name": name}))
    update, before = OptimizerUpdate(optimizer), {k: v.clone() for k, v in fpd.named_parameters()}
    backbone_step(fpd, *batch, update, OPEN)
    unreached = {k for k, v in fpd.named_parameters() if v.grad is None}
    assert unreached == {k for k in before if k.startswith("decoder.")}
    assert all(torch.equal(v, before[k]) for k, v in fpd.named_parameters() if k in unreached)
    for config in (SHUT, OPEN):
        two_phase_step(fpd, *batch, update, config)
    moved = {k for k, v in fpd.named_parameters() if not torch.equal(v, before[k])}
    assert moved >= unreached | {"head.linear.weight", "backbone.net.conv1.0.weight"}


def test_a_step_of_the_backbone_alone_is_on_the_cross_entropy_of_noisy_images(fpd: FPD, batch: Batch) -> None:
    clean, noisy, labels = batch
    reference = copy.deepcopy(fpd)
    logits = reference.head(reference.back(noisy, noisy))
    update = Recorded()
    result = backbone_step(fpd, *batch, update, corrected_training(alpha_ce=0.5))
    assert update.losses == _approx(0.5 * F.cross_entropy(logits, labels))
    assert update.only == [None]
    assert result.second is None
    assert result.gate_open is None
    assert result.first.restoration is not None
    assert [float(result.first.restoration)] == _approx(F.mse_loss(noisy, clean))


def test_a_shut_gate_steps_on_the_weighted_restoration_loss_alone(fpd: FPD, batch: Batch) -> None:
    clean, noisy, _ = batch
    expected = 0.5 * F.mse_loss(copy.deepcopy(fpd)(noisy).restored, clean)
    update = Recorded()
    result = two_phase_step(fpd, *batch, update, corrected_training(threshold=0.0, alpha_restore=0.5))
    assert update.losses == _approx(expected)
    assert update.only == [frozenset({"front_and_pyramid", "upscaling"})]
    assert result.second is None


def test_an_open_gate_steps_on_both_phases_in_turn(fpd: FPD, batch: Batch) -> None:
    clean, noisy, labels = batch
    config = corrected_training(threshold=1e9, alpha_ce=0.7, alpha_restore=0.3, alpha_restore_second=0.2)
    reference = copy.deepcopy(fpd)
    first = reference(noisy)
    loss1 = 0.7 * F.cross_entropy(first.logits, labels) + 0.3 * F.mse_loss(first.restored, clean)
    second = reference(first.restored.detach())  # batch norm has seen the first phase
    loss2 = 0.7 * F.cross_entropy(second.logits, labels) + 0.2 * F.mse_loss(second.restored, clean)
    update = Recorded()
    result = two_phase_step(fpd, *batch, update, config)
    assert update.losses == _approx(loss1, loss2)
    assert update.only == [None, None]
    assert result.first.restoration is not None
    assert not result.first.restoration.requires_grad
    assert int(result.first.correct) == int((first.logits.argmax(dim=1) == labels).sum())


def test_the_second_phase_stops_at_the_restored_image_unless_joint(fpd: FPD, batch: Batch) -> None:
    gradients: dict[str, list[Tensor]] = {}
    for mode in ("detached", "joint"):
        model, collected = copy.deepcopy(fpd), list[Tensor]()

        def backward(loss: Tensor, model: FPD = model, collected: list[Tensor] = collected, **_: object) -> None:
            loss.backward()  # type: ignore[no-untyped-call]
            weight = model.decoder.laterals[0].weight
            assert isinstance(weight, Tensor)
            assert weight.grad is not None
            collected.append(weight.grad.clone())

        two_phase_step(model, *batch, backward, corrected_training(threshold=1e9, second_pass=mode))
        gradients[mode] = collected
    assert [len(gradients[m]) for m in ("detached", "joint")] == [2, 1]
    # Without the cut phase 2 has a gradient in the first restoration too; the sum of both phases differs.
    assert not torch.allclose(gradients["detached"][-1], gradients["joint"][-1], rtol=1e-3)


def test_joint_is_the_sum_of_both_phases(fpd: FPD, batch: Batch) -> None:
    clean, noisy, labels = batch
    reference = copy.deepcopy(fpd)
    first = reference(noisy)
    outputs = (first, reference(first.restored))
    losses = [F.cross_entropy(o.logits, labels) + F.mse_loss(o.restored, clean) for o in outputs]
    update = Recorded()
    two_phase_step(fpd, *batch, update, corrected_training(threshold=1e9, second_pass="joint"))
    assert update.losses == _approx(losses[0] + losses[1])


@pytest.mark.parametrize("adversarial", [False, True])
def test_the_cross_entropy_of_both_phases_is_smoothed(
    adversarial: bool, fpd: FPD, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    smoothings = []

    def recorded(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
        smoothings.append(label_smoothing)
        return cross_entropy(logits, labels, label_smoothing=label_smoothing)

    cross_entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", recorded)
    config = corrected_training(threshold=1e9, label_smoothing=0.2)
    if adversarial:
        settings = AdversarialConfig(label_smoothing=0.1, batch="both")
        adversarial_step(fpd, *batch, Recorded(), config, settings)
    else:
        two_phase_step(fpd, *batch, Recorded(), config)
    assert smoothings == ([0.1] * 3 if adversarial else [0.2] * 2)


def test_phase_two_runs_in_every_second_pass_interval_th_batch(fpd: FPD, batch: Batch) -> None:
    steps = []
    for index in range(5):
        update = Recorded()
        result = two_phase_step(fpd, *batch, update, corrected_training(threshold=1e9, second_pass_interval=3), index)
        steps.append(len(update.losses))
        assert (result.second is None) == (len(update.losses) == 1)
    assert steps == [2, 1, 1, 2, 1]


def test_the_baseline_steps_once_on_the_cross_entropy_of_noisy_images(baseline: Baseline, batch: Batch) -> None:
    _, noisy, labels = batch
    expected = F.cross_entropy(copy.deepcopy(baseline)(noisy), labels)
    update = Recorded()
    result = baseline_step(baseline, noisy, labels, update, corrected_training(alpha_ce=0.5))
    assert update.losses == _approx(0.5 * expected)
    assert result.first.restoration is None
    with pytest.raises(InputError, match="use baseline_step"):
        two_phase_step(baseline, *batch, update, OPEN)


# Noise between the passes


def _between(model: FPD, batch: Batch, config: TrainingConfig, seed: int | None = 0) -> list[Tensor | None]:
    """Return the noise that each forward pass of a step gets."""
    seen: list[Tensor | None] = []

    def record(module: object, args: tuple[Any, ...]) -> None:
        seen.append(args[1] if len(args) > 1 else None)

    draws = None if seed is None else torch.Generator().manual_seed(seed)
    with model.register_forward_pre_hook(record):
        two_phase_step(model, *batch, Recorded(), config, generator=draws)
    return seen


def test_each_phase_gets_noise_of_its_own_from_the_generator(fpd: FPD, batch: Batch) -> None:
    config = TrainingConfig(noise=0.1, middle_noise=0.3, threshold=1e9)
    first, second = _between(fpd, batch, config)
    again, other = _between(fpd, batch, config), _between(fpd, batch, config, seed=1)
    assert first is not None
    assert second is not None
    assert first.shape == batch[0].shape
    for noise in (first, second):
        assert 0.27 < float(noise.abs().max()) <= 0.3
        assert abs(float(noise.mean())) < 0.05
    assert not torch.equal(first, second)
    assert again[0] is not None
    assert again[1] is not None
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    assert other[0] is not None
    assert not torch.equal(first, other[0])


def test_noise_between_the_passes_enters_the_back_pass_alone(fpd: FPD, batch: Batch) -> None:
    clean, noisy, labels = batch
    config = corrected_training(middle_noise=0.3, threshold=1e9)
    noise = 0.3 * (2 * torch.rand(noisy.shape, generator=torch.Generator().manual_seed(0)) - 1)
    reference, update = copy.deepcopy(fpd), Recorded()
    restored = reference.restore(noisy)
    logits = reference.head(reference.back(restored, noisy, noise))
    expected = F.cross_entropy(logits, labels) + F.mse_loss(restored, clean)
    result = two_phase_step(fpd, *batch, update, config, 1, torch.Generator().manual_seed(0))
    assert update.losses[:1] == _approx(expected)
    assert result.first.restoration is not None


def test_by_default_there_is_as_much_noise_between_the_passes_as_before_them(fpd: FPD, batch: Batch) -> None:
    assert (TrainingConfig(noise=0.2).back_pass_noise, corrected_training(noise=0.2).back_pass_noise) == (0.2, 0)
    given, default = (
        _between(fpd, batch, TrainingConfig(noise=0.2, threshold=1e9, middle_noise=eps)) for eps in (0.2, None)
    )
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(given, default, strict=True))


def test_without_noise_between_the_passes_no_generator_is_needed(fpd: FPD, batch: Batch) -> None:
    config = TrainingConfig(middle_noise=0, threshold=1e9)
    with_generator, without = Recorded(), Recorded()
    two_phase_step(copy.deepcopy(fpd), *batch, with_generator, config, generator=torch.Generator())
    two_phase_step(copy.deepcopy(fpd), *batch, without, config)
    assert with_generator.losses == without.losses
    assert len(without.losses) == 2
    assert _between(fpd, batch, config, seed=None) == [None, None]
    with pytest.raises(InputError, match=r"±0\.1, is drawn from a generator, found None; .*set middle_noise=0"):
        two_phase_step(fpd, *batch, without, TrainingConfig(noise=0.1, threshold=1e9))


def test_noise_between_the_passes_is_in_the_units_of_the_images_noise(fpd: FPD, batch: Batch) -> None:
    pixels, normalised = (
        parse(TrainingConfig, {"noise": 0.1, "threshold": 1e9, "space": space}) for space in ("pixels", "normalised")
    )
    fpd.std = torch.full_like(fpd.std, 0.25)
    for a, b in zip(_between(fpd, batch, pixels), _between(fpd, batch, normalised), strict=True):
        assert a is not None
        assert b is not None
        assert torch.allclose(b, 0.25 * a)


# Adversarial step


@pytest.mark.parametrize("target", ["clean", "input"])
@pytest.mark.parametrize("passes", ["joint", "both"])
def test_the_losses_on_clean_and_adversarial_images_are_averaged(
    fpd: FPD, batch: Batch, target: str, passes: str
) -> None:
    clean, adversarial, labels = batch
    reference, update, targets = copy.deepcopy(fpd), Recorded(), clean if target == "clean" else adversarial
    if passes == "both":  # in two passes
        expected = _loss(reference, clean, clean, labels) + _loss(reference, adversarial, targets, labels)
    else:
        images = torch.cat([clean, adversarial]), torch.cat([clean, targets]), labels.repeat(2)
        expected = 2 * _loss(reference, *images)
    settings = parse(AdversarialConfig, {"batch": passes, "restoration_target": target, "second_pass": False})
    result = adversarial_step(fpd, *batch, update, OPEN, settings)
    assert update.losses == _approx(expected / 2)
    assert result.adversarial is not None
    assert result.first.counted == result.adversarial.counted == 6


@pytest.mark.parametrize("target", ["clean", "input"])
def test_halves_runs_one_half_clean_and_the_other_adversarial(fpd: FPD, batch: Batch, target: str) -> None:
    clean, adversarial, labels = batch
    half = adversarial[3:]
    images = torch.cat([clean[:3], half])
    out = copy.deepcopy(fpd)(images)
    expected = F.cross_entropy(out.logits, labels) + F.mse_loss(out.restored, clean if target == "clean" else images)
    update = Recorded()
    settings = parse(AdversarialConfig, {"batch": "halves", "restoration_target": target, "second_pass": False})
    result = adversarial_step(fpd, clean, half, labels, update, OPEN, settings)
    assert update.losses == _approx(expected)
    assert result.adversarial is not None
    assert (result.first.counted, result.adversarial.counted) == (3, 3)
    assert [float(result.adversarial.ce)] == _approx(F.cross_entropy(out.logits[3:], labels[3:]))


def test_the_second_pass_starts_from_the_restored_adversarial_images(fpd: FPD, batch: Batch) -> None:
    clean, adversarial, labels = batch
    reference, update = copy.deepcopy(fpd), Recorded()
    second = reference(reference(torch.cat([clean, adversarial])).restored.detach()[6:])
    config = corrected_training(threshold=1e9, alpha_restore_second=0.3)
    expected = F.cross_entropy(second.logits, labels) + 0.3 * F.mse_loss(second.restored, clean)
    result = adversarial_step(fpd, *batch, update, config, AdversarialConfig())
    assert update.losses[1:] == _approx(expected)
    assert result.second is not None


def test_restored_scale_enters_gate_and_clean_loss_alone(fpd: FPD, batch: Batch) -> None:
    clean, adversarial, labels = batch
    scaled = F.mse_loss(255 * copy.deepcopy(fpd)(clean).restored, clean).detach()
    settings = AdversarialConfig(batch="both", restored_scale=255, second_pass=False)
    shut, opened = Recorded(), Recorded()
    adversarial_step(copy.deepcopy(fpd), *batch, shut, corrected_training(threshold=float(scaled) * 0.99), settings)
    assert shut.losses == _approx(scaled)
    assert shut.only == [frozenset({"front_and_pyramid", "upscaling"})]
    reference = copy.deepcopy(fpd)
    expected = _loss(reference, clean, clean, labels, 255) + _loss(reference, adversarial, clean, labels)
    adversarial_step(fpd, *batch, opened, corrected_training(threshold=float(scaled) * 1.1), settings)
    assert opened.losses == _approx(expected / 2)
    assert opened.only == [None]


def test_without_a_gate_everything_steps_at_any_restoration_loss(fpd: FPD, batch: Batch) -> None:
    update = Recorded()
    result = adversarial_step(fpd, *batch, update, SHUT, AdversarialConfig(gate=False, second_pass=False))
    assert result.gate_open
    assert update.only == [None]


def test_without_adversarial_images_there_is_no_second_pass(fpd: FPD, batch: Batch) -> None:
    clean, _, labels = batch
    expected = _loss(copy.deepcopy(fpd), clean, clean, labels)
    update = Recorded()
    result = adversarial_step(fpd, clean, None, labels, update, OPEN, AdversarialConfig())
    assert update.losses == _approx(expected)
    assert result.adversarial is None
    assert result.second is None


def test_the_baseline_s_adversarial_step_is_on_the_mean_cross_entropy(baseline: Baseline, batch: Batch) -> None:
    clean, adversarial, labels = batch
    reference = copy.deepcopy(baseline)
    expected = F.cross_entropy(reference(torch.cat([clean, adversarial])), labels.repeat(2))
    update = Recorded()
    result = adversarial_step(baseline, *batch, update, OPEN, AdversarialConfig())
    assert update.losses == _approx(expected)
    assert result.first.restoration is None


def test_the_feature_loss_is_the_relative_distance_of_the_features_before_the_head(fpd: FPD, batch: Batch) -> None:
    clean, adversarial, labels = batch
    losses = {}
    for alpha in (0.0, 2.0):
        settings = AdversarialConfig(objective="trades", alpha_features=alpha, second_pass=False, gate=False)
        update = Recorded()
        adversarial_step(copy.deepcopy(fpd), clean, adversarial, labels, update, TrainingConfig(), settings)
        losses[alpha] = float(update.losses[0])
    kept: list[Tensor] = []
    hook = fpd.head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
    fpd(torch.cat([clean, adversarial]))
    hook.remove()
    of_clean, of_adversarial = kept[0].chunk(2)
    expected = 2.0 * float((of_adversarial - of_clean).square().mean() / of_clean.square().mean())
    assert expected > 0
    assert losses[2.0] - losses[0.0] == pytest.approx(expected, rel=1e-2)
