from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robustfpd.config import AdversarialConfig, RunConfig, TrainingConfig, parse, recipe
from robustfpd.errors import InputError
from robustfpd.models import FPD, Baseline, build, enhance, load
from robustfpd.models.checkpoint import read_weights
from robustfpd.training import train
from robustfpd.training.adversarial import adversarial_step
from robustfpd.training.perturbations import adversary


def _model() -> FPD:
    return enhance("resnet_mini", num_classes=4, in_channels=1, image_size=8, pyramid_channels=8).train()


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(3)
    clean = torch.rand(6, 1, 8, 8, generator=draws)
    perturbed = (clean + 0.1 * torch.rand(clean.shape, generator=draws)).clamp(0, 1)
    return clean, perturbed, torch.tensor([0, 1, 2, 3, 0, 1])


class _Losses:
    """An update that notes what it is asked for and steps nothing."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.only: list[frozenset[str] | None] = []
        self.kept: list[bool] = []

    def __call__(self, loss: Tensor, *, only: frozenset[str] | None = None, keep_graph: bool = False) -> None:
        self.losses.append(float(loss.detach()))
        self.only.append(only)
        self.kept.append(keep_graph)


def _objective(model: FPD, images: Tensor, target: Tensor, labels: Tensor, scale: float = 1.0) -> Tensor:
    out = model(images)
    return F.cross_entropy(out.logits, labels) + F.mse_loss(scale * out.restored, target)


OPEN = TrainingConfig(threshold=1e9)


@pytest.mark.parametrize("target", ["clean", "input"])
def test_both_averages_the_losses_on_clean_and_adversarial_images(target: str) -> None:
    model, (clean, perturbed, labels) = _model(), _batch()
    baseline, update = copy.deepcopy(model), _Losses()
    expected = _objective(baseline, clean, clean, labels)
    expected = expected + _objective(baseline, perturbed, clean if target == "clean" else perturbed, labels)
    settings = parse(AdversarialConfig, {"restoration_target": target, "second_pass": False})
    result = adversarial_step(OPEN, settings)(model, clean, perturbed, labels, update)
    assert update.losses == pytest.approx([float(expected.detach()) / 2], rel=1e-5)
    assert result.counted == result.adversarial_counted == 6
    assert result.adversarial_ce is not None


def test_halves_runs_one_half_clean_and_the_other_adversarial() -> None:
    model, (clean, perturbed, labels) = _model(), _batch()
    half = perturbed[3:]
    out = copy.deepcopy(model)(torch.cat([clean[:3], half]))
    expected = F.cross_entropy(out.logits, labels) + F.mse_loss(out.restored, clean)
    update = _Losses()
    settings = AdversarialConfig(batch="halves", second_pass=False)
    result = adversarial_step(OPEN, settings)(model, clean, half, labels, update)
    assert update.losses == pytest.approx([float(expected.detach())], rel=1e-5)
    assert (result.counted, result.adversarial_counted) == (3, 3)
    assert result.adversarial_ce is not None
    assert float(result.adversarial_ce) == pytest.approx(float(F.cross_entropy(out.logits[3:], labels[3:]).detach()))


def test_the_second_pass_starts_from_the_restored_adversarial_images() -> None:
    model, (clean, perturbed, labels) = _model(), _batch()
    baseline, update = copy.deepcopy(model), _Losses()
    baseline(clean)  # batch norm sees the passes in this order
    again = baseline(baseline(perturbed).restored.detach())
    config = TrainingConfig(threshold=1e9, alpha_restore_second=0.3)
    expected = F.cross_entropy(again.logits, labels) + 0.3 * F.mse_loss(again.restored, clean)
    result = adversarial_step(config, AdversarialConfig())(model, clean, perturbed, labels, update)
    assert update.losses[1] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert result.second_ce is not None


def test_restored_scale_enters_gate_and_clean_loss_alone() -> None:
    model, (clean, perturbed, labels) = _model(), _batch()
    scaled = float(F.mse_loss(255 * copy.deepcopy(model)(clean).restored, clean).detach())
    settings = AdversarialConfig(restored_scale=255, second_pass=False)
    shut, opened = _Losses(), _Losses()
    adversarial_step(TrainingConfig(threshold=scaled * 0.99), settings)(model, clean, perturbed, labels, shut)
    assert shut.losses == pytest.approx([scaled], rel=1e-4)
    assert shut.only == [frozenset({"front_and_pyramid", "upscaling"})]
    baseline = copy.deepcopy(model)
    expected = _objective(baseline, clean, clean, labels, 255) + _objective(baseline, perturbed, clean, labels)
    adversarial_step(TrainingConfig(threshold=scaled * 1.1), settings)(model, clean, perturbed, labels, opened)
    assert opened.losses == pytest.approx([float(expected.detach()) / 2], rel=1e-4)
    assert opened.only == [None]


def test_without_a_gate_everything_steps_whatever_the_restoration() -> None:
    model, (clean, perturbed, labels) = _model(), _batch()
    update = _Losses()
    settings = AdversarialConfig(gate=False, second_pass=False)
    result = adversarial_step(TrainingConfig(threshold=0), settings)(model, clean, perturbed, labels, update)
    assert result.gate_open
    assert update.only == [None]


def test_before_the_start_epoch_images_are_clean_and_there_is_no_second_pass() -> None:
    model, (clean, _, labels) = _model(), _batch()
    settings = AdversarialConfig(start_epoch=2)
    draws = torch.Generator().manual_seed(0)
    assert adversary(settings)(model, clean, labels, 2.0, draws) is None
    expected = _objective(copy.deepcopy(model), clean, clean, labels)
    update = _Losses()
    result = adversarial_step(OPEN, settings)(model, clean, None, labels, update)
    assert update.losses == pytest.approx([float(expected.detach())], rel=1e-5)
    assert result.adversarial_ce is None
    assert result.second_ce is None


@pytest.mark.parametrize("attack", ["pgd", "fgsm"])
def test_the_adversary_stays_in_its_ball_which_grows_and_leaves_the_model_as_it_was(attack: str) -> None:
    model, (clean, _, labels) = _model(), _batch()
    settings = parse(AdversarialConfig, {"attack": attack, "eps": 0.2, "steps": 3, "warmup": 2.0, "start_epoch": 1})
    before = copy.deepcopy(model.state_dict())
    reached = []
    for epoch in (1.5, 2.0, 3.0, 9.0):
        found = adversary(settings)(model, clean, labels, epoch, torch.Generator().manual_seed(0))
        assert found is not None
        assert not found.requires_grad
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
        reached.append(float((found - clean).abs().max()))
    assert reached == pytest.approx([0.05, 0.1, 0.2, 0.2], abs=1e-5)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_halves_attacks_the_second_half_alone() -> None:
    model, (clean, _, labels) = _model(), _batch()
    settings = AdversarialConfig(batch="halves", eps=0.1, steps=1)
    found = adversary(settings)(model, clean[:5], labels[:5], 1.0, torch.Generator().manual_seed(0))
    assert found is not None
    assert len(found) == 3
    assert float((found - clean[2:5]).abs().max()) == pytest.approx(0.1, abs=1e-5)


@pytest.mark.parametrize(("labels", "expected"), [("predicted", "prediction"), ("true", "truth")])
def test_the_attack_leads_away_from_the_prediction_or_the_truth(
    labels: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (clean, _, truth) = _model(), _batch()
    given: list[Tensor] = []

    def watched(classifier: object, images: Tensor, targets: Tensor, **_: object) -> Tensor:
        given.append(targets)
        return images

    monkeypatch.setattr("robustfpd.training.perturbations.pgd", watched)
    settings = parse(AdversarialConfig, {"labels": labels})
    adversary(settings)(model, clean, truth, 1.0, torch.Generator())
    with torch.no_grad():
        prediction = copy.deepcopy(model).eval()(clean).logits.argmax(dim=1)
    assert not torch.equal(prediction, truth)
    assert torch.equal(given[0], {"prediction": prediction, "truth": truth}[expected])


def test_the_twins_step_is_the_mean_cross_entropy() -> None:
    fpd, (clean, perturbed, labels) = _model(), _batch()
    baseline = build(fpd.task, fpd.config.baseline()).train()
    same = copy.deepcopy(baseline)
    expected = (F.cross_entropy(same(clean), labels) + F.cross_entropy(same(perturbed), labels)) / 2
    update = _Losses()
    result = adversarial_step(OPEN, AdversarialConfig())(baseline, clean, perturbed, labels, update)
    assert update.losses == pytest.approx([float(expected.detach())], rel=1e-5)
    assert result.restoration is None


def _run(**adversarial: object) -> RunConfig:
    procedure = {"epochs": 2, "batch_size": 32, "schedule": {"name": "constant"}}
    return parse(
        RunConfig,
        {
            "data": {"train_limit": 96},
            "model": {"pyramid_channels": 8},
            "training": {**procedure, "noise": 0.1},
            "adversarial": {**procedure, "eps": 0.1, "steps": 2, "select_images": 40, **adversarial},
        },
    )


def test_the_second_stage_begins_with_the_first_ones_best_weights_and_leaves_them(tmp_path: Path) -> None:
    first = _run()
    train(first, tmp_path / "run", device="cpu")
    before = read_weights(tmp_path / "run" / "checkpoints" / "best")
    stage = _run(optimizer={"name": "sgd", "lr": 1e-12}, epochs=1).model_copy(update={"stage": "adversarial"})
    result = train(stage, tmp_path / "run" / "adversarial", start=tmp_path / "run", device="cpu")
    assert result.history[0].validation_robust_accuracy is not None
    assert result.history[0].adversarial_ce is not None
    after = read_weights(tmp_path / "run" / "checkpoints" / "best")
    assert all(torch.equal(before[k], after[k]) for k in before)
    trained = load(tmp_path / "run" / "adversarial").state_dict()
    moved = [k for k in before if "running" not in k and "num_batches" not in k]
    assert all(torch.allclose(before[k], trained[k], atol=1e-6) for k in moved)
    assert any(not torch.equal(before[k], trained[k]) for k in before if "running" in k)


@pytest.mark.parametrize("plain", [False, True])
def test_resuming_the_second_stage_ends_with_the_same_weights(tmp_path: Path, plain: bool) -> None:
    config = _run().baseline() if plain else _run()
    train(config, tmp_path / "run", device="cpu")
    stage = config.model_copy(update={"stage": "adversarial"})
    whole = train(stage, tmp_path / "whole", start=tmp_path / "run", device="cpu")
    assert isinstance(whole.model, Baseline if plain else FPD)
    longer = stage.adversarial.model_copy(update={"epochs": 1})
    train(stage.model_copy(update={"adversarial": longer}), tmp_path / "cut", start=tmp_path / "run", device="cpu")
    stage.save(tmp_path / "cut" / "config.yaml")  # as if interrupted after its first epoch
    train(stage, tmp_path / "cut", start=tmp_path / "run", resume=True, device="cpu")
    a, b = (read_weights(tmp_path / name / "checkpoints" / "last") for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_epoch_is_picked_by_robust_accuracy_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    robust = iter([0.9, 0.1])
    monkeypatch.setattr("robustfpd.training.loop.robust_accuracy", lambda *_: next(robust))
    stage = _run(start="scratch").model_copy(update={"stage": "adversarial"})
    assert train(stage, tmp_path / "robust", device="cpu").best_epoch == 0
    clean = _run(start="scratch", select_by="clean").model_copy(update={"stage": "adversarial"})
    result = train(clean, tmp_path / "clean", device="cpu")
    assert result.history[0].validation_robust_accuracy is None
    scores = [row.validation_accuracy for row in result.history]
    assert result.best_epoch == scores.index(max(scores)) or scores[0] == scores[1]


def test_a_start_that_does_not_fit_is_named_before_training(tmp_path: Path) -> None:
    stage = _run().model_copy(update={"stage": "adversarial"})
    with pytest.raises(InputError, match="begins with a checkpoint"):
        train(stage, tmp_path / "a", device="cpu")
    scratch = _run(start="scratch").model_copy(update={"stage": "adversarial"})
    with pytest.raises(InputError, match="is scratch, found start"):
        train(scratch, tmp_path / "b", start=tmp_path, device="cpu")
    _model().eval().save(tmp_path / "four-classes")
    with pytest.raises(InputError, match=r"for 4 classes of 1×8×8 images, but data set digits has 10 classes"):
        train(stage, tmp_path / "c", start=tmp_path / "four-classes", device="cpu")
    wide = enhance("resnet_mini", num_classes=10, in_channels=1, image_size=8, pyramid_channels=16)
    wide.save(tmp_path / "wide")
    with pytest.raises(InputError, match=r"another network .* settings: pyramid_channels was 16, now 8"):
        train(stage, tmp_path / "d", start=tmp_path / "wide", device="cpu")
    assert not any((tmp_path / name).exists() for name in "abcd")


def test_the_recipe_trains_adversarially_at_its_own_radius() -> None:
    assert recipe("mnist/mini").adversarial.eps == 0.3
