from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.fpds import as_trained, corrected_training
from torch import Tensor

from robustfpd import data
from robustfpd.config import (
    AdversarialConfig,
    OptimizerConfig,
    RunConfig,
    TaskConfig,
    TrainingConfig,
    parse,
    recipe,
    recipe_names,
)
from robustfpd.data.transforms import add_uniform_noise
from robustfpd.errors import InputError
from robustfpd.models import FPD, Baseline, build, enhance
from robustfpd.training.optim import GROUPS, OptimizerUpdate, make_optimizer, parameter_groups
from robustfpd.training.steps import (
    adversarial_step,
    backbone_step,
    baseline_step,
    gate_opens,
    noise_unit,
    two_phase_step,
)

Batch = tuple[Tensor, Tensor, Tensor]
OPEN = corrected_training(threshold=1e9)
SHUT = corrected_training(threshold=0.0)


class Recorded:
    """An update that records its arguments and does not step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.only: list[frozenset[str] | None] = []

    def __call__(self, loss: Tensor, *, only: frozenset[str] | None = None, retain_graph: bool = False) -> None:
        self.losses.append(float(loss.detach()))
        self.only.append(only)


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


def test_by_default_a_shut_gate_steps_the_stem_and_the_restoration(batch: Batch) -> None:
    model = enhance("resnet_mini", num_classes=4, in_channels=1, image_size=8, pyramid_channels=8)
    model = as_trained(model).train()
    update = OptimizerUpdate(make_optimizer(parameter_groups(model), OptimizerConfig()))
    before = {k: v.clone() for k, v in model.named_parameters()}
    assert not two_phase_step(model, *batch, update, SHUT).gate_open
    moved = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.startswith(("backbone.net.conv1.", "backbone.net.bn1.", "decoder."))}


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
    assert not result.gate_open
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


def test_phase_two_runs_in_every_second_pass_interval_th_batch(fpd: FPD, batch: Batch) -> None:
    steps = []
    for index in range(5):
        update = Recorded()
        result = two_phase_step(fpd, *batch, update, corrected_training(threshold=1e9, second_pass_interval=3), index)
        steps.append(len(update.losses))
        assert (result.second is None) == (len(update.losses) == 1)
    assert steps == [2, 1, 1, 2, 1]


def test_the_baseline_takes_as_many_steps_as_the_fpd() -> None:
    def epochs(**training: Any) -> int:
        return parse(RunConfig, {"training": {"epochs": 12, **training}}).baseline().training.epochs

    whole = {"restoration_start": 0}
    assert [epochs(**whole, second_pass_interval=k) for k in (1, 2, 3)] == [24, 18, 16]
    assert [epochs(restoration_start=0.5, second_pass_interval=k) for k in (1, 2, 3)] == [18, 15, 14]
    assert epochs(second_pass="joint") == 12


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


# Gate and units


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
    others = [F.mse_loss(constant + shift, clean) for shift in (-0.01, 0.01)]
    assert all(other > F.mse_loss(constant, clean) for other in others)


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
        noisy = add_uniform_noise(clean, config.noise, draws, noise_unit(model, config))
        result = two_phase_step(model, clean, noisy, labels, Recorded(), config, 0, draws)
        assert result.first.restoration is not None
        assert float(result.first.restoration) == pytest.approx(1, rel=0.03)


STAND_INS = {"resnet50": "published_resnet_1_1_1_1", "resnet101": "published_resnet_1_1_1_1",
             "published_resnext_3_4_6_3": "published_resnext_1_1_1_1"}  # fmt: skip


def _first_losses(name: str, backbone: str, images: int, size: tuple[int, int] | None = None) -> list[float]:
    """Return the losses of both phases of a recipe's first step on random images."""
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
    noisy = add_uniform_noise(clean, run.training.noise, draws, noise_unit(model, run.training))
    update = OptimizerUpdate(make_optimizer(parameter_groups(model), run.training.optimizer), 10.0)
    result = two_phase_step(model, clean, noisy, torch.arange(images) % 2, update, run.training, 0, draws)
    assert result.gate_open
    assert result.second is not None
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    losses = (result.first.restoration, result.second.restoration, result.first.ce, result.second.ce)
    return [float(loss) for loss in losses if loss is not None]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipes_first_losses_are_small(name: str) -> None:
    """Networks of one block a stage stand for the deep ones; the restoration starts as the noise, of loss 1."""
    backbone = recipe(name).model.backbone
    size = None if backbone == "resnet_mini" else (64, 64)
    first, second, *entropies = _first_losses(name, STAND_INS.get(backbone, backbone), 2, size)
    assert first == pytest.approx(1, rel=0.1)
    assert 0 < second < 10
    assert all(0 < entropy < 30 for entropy in entropies)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.endswith("/mini")])
def test_every_deep_recipes_first_losses_are_small(name: str) -> None:
    first, second, *entropies = _first_losses(name, recipe(name).model.backbone, 2)
    assert first == pytest.approx(1, rel=0.1)
    assert 0 < second < 10
    assert all(0 < entropy < 30 for entropy in entropies)


# Adversarial step


@pytest.mark.parametrize("target", ["clean", "input"])
def test_both_averages_the_losses_on_clean_and_adversarial_images(fpd: FPD, batch: Batch, target: str) -> None:
    clean, adversarial, labels = batch
    reference, update = copy.deepcopy(fpd), Recorded()
    expected = _loss(reference, clean, clean, labels)
    expected = expected + _loss(reference, adversarial, clean if target == "clean" else adversarial, labels)
    settings = parse(AdversarialConfig, {"restoration_target": target, "second_pass": False})
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
    reference(clean)  # batch norm sees the passes in this order
    second = reference(reference(adversarial).restored.detach())
    config = corrected_training(threshold=1e9, alpha_restore_second=0.3)
    expected = F.cross_entropy(second.logits, labels) + 0.3 * F.mse_loss(second.restored, clean)
    result = adversarial_step(fpd, *batch, update, config, AdversarialConfig())
    assert update.losses[1:] == _approx(expected)
    assert result.second is not None


def test_restored_scale_enters_gate_and_clean_loss_alone(fpd: FPD, batch: Batch) -> None:
    clean, adversarial, labels = batch
    scaled = F.mse_loss(255 * copy.deepcopy(fpd)(clean).restored, clean).detach()
    settings = AdversarialConfig(restored_scale=255, second_pass=False)
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
    expected = (F.cross_entropy(reference(clean), labels) + F.cross_entropy(reference(adversarial), labels)) / 2
    update = Recorded()
    result = adversarial_step(baseline, *batch, update, OPEN, AdversarialConfig())
    assert update.losses == _approx(expected)
    assert result.first.restoration is None


# Parameter groups and update


def test_parameter_groups_separate_front_upscaling_and_head(fpd: FPD, baseline: Baseline) -> None:
    groups = {group["name"]: {id(p) for p in group["params"]} for group in parameter_groups(fpd)}
    assert tuple(groups) == GROUPS
    assert groups["head"] == {id(p) for p in fpd.head.parameters()}
    assert groups["upscaling"] == {id(p) for p in fpd.decoder.upscale.parameters()}
    assert groups["front_and_pyramid"] >= {id(p) for p in fpd.decoder.laterals.parameters()}
    members = [i for group in groups.values() for i in group]
    assert sorted(members) == sorted(id(p) for p in fpd.parameters())
    assert [group["name"] for group in parameter_groups(baseline)] == ["front_and_pyramid", "head"]


def test_an_update_clips_the_gradient_of_all_groups_before_it_leaves_some_out(fpd: FPD, batch: Batch) -> None:
    clean, noisy, labels = batch
    reference = copy.deepcopy(fpd)
    _loss(reference, noisy, clean, labels).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    torch.optim.SGD(reference.decoder.upscale.parameters(), lr=1.0).step()
    update = OptimizerUpdate(torch.optim.SGD(parameter_groups(fpd), lr=1.0), clip_grad_norm=0.1)
    update(_loss(fpd, noisy, clean, labels), only=frozenset({"upscaling"}))
    for (name, p), expected in zip(fpd.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, expected, atol=1e-7), name


def test_an_optimizer_without_named_groups_is_refused(fpd: FPD) -> None:
    with pytest.raises(InputError, match=r"found None; build it from robustfpd\.training\.parameter_groups\(model\)"):
        OptimizerUpdate(torch.optim.SGD(fpd.parameters(), lr=0.1))
