"""The adversarial stage of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from robustfpd import data
from robustfpd.config import AdversarialConfig, DataConfig, RunConfig, parse, recipe
from robustfpd.data import ImageSet
from robustfpd.errors import InputError
from robustfpd.models import FPD, Baseline, build, enhance, load
from robustfpd.models.checkpoint import read_weights
from robustfpd.training import EpochMetrics, RunFolder, adversarial_step, train
from robustfpd.training.metrics import catastrophic_overfitting, robust_accuracy, validate


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


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Folders of a baseline's two-phase run (True) and an FPD's (False)."""
    folder: Path = tmp_path_factory.mktemp("first")
    for baseline in (False, True):
        train(_run().baseline() if baseline else _run(), folder / str(baseline), device="cpu")
    return {baseline: folder / str(baseline) for baseline in (False, True)}


def test_the_second_stage_begins_with_the_first_ones_best_weights_and_leaves_them(
    first_stage: dict[bool, Path], tmp_path: Path
) -> None:
    best = first_stage[False] / "checkpoints" / "best"
    before = read_weights(best)
    stage = _run(optimizer={"name": "sgd", "lr": 1e-12}, epochs=1).model_copy(update={"stage": "adversarial"})
    result = train(stage, tmp_path / "adversarial", start=first_stage[False], device="cpu")
    assert result.history[0].validation_robust_accuracy is not None
    assert result.history[0].adversarial_ce is not None
    after = read_weights(best)
    assert all(torch.equal(before[k], after[k]) for k in before)
    trained = load(tmp_path / "adversarial").state_dict()
    stepped = [k for k in before if "running" not in k and "num_batches" not in k]
    assert all(torch.allclose(before[k], trained[k], atol=1e-6) for k in stepped)
    assert any(not torch.equal(before[k], trained[k]) for k in before if "running" in k)


@pytest.mark.parametrize("baseline", [False, True])
def test_resuming_the_second_stage_ends_with_the_same_weights(
    first_stage: dict[bool, Path], tmp_path: Path, baseline: bool
) -> None:
    config, start = _run().baseline() if baseline else _run(), first_stage[baseline]
    stage = config.model_copy(update={"stage": "adversarial"})
    whole = train(stage, tmp_path / "whole", start=start, device="cpu")
    assert isinstance(whole.model, Baseline if baseline else FPD)
    shorter = stage.adversarial.model_copy(update={"epochs": 1})
    train(stage.model_copy(update={"adversarial": shorter}), tmp_path / "cut", start=start, device="cpu")
    stage.save(tmp_path / "cut" / "config.yaml")  # as if interrupted after its first epoch
    train(stage, tmp_path / "cut", start=start, resume=True, device="cpu")
    a, b = (read_weights(tmp_path / name / "checkpoints" / "last") for name in ("whole", "cut"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_epoch_is_selected_by_robust_accuracy_or_by_clean_accuracy(
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
    four = enhance("resnet_mini", num_classes=4, in_channels=1, image_size=8, pyramid_channels=8)
    four.save(tmp_path / "four-classes")
    with pytest.raises(InputError, match=r"for 4 classes of 1×8×8 images, but data set digits has 10 classes"):
        train(stage, tmp_path / "c", start=tmp_path / "four-classes", device="cpu")
    wide = enhance("resnet_mini", num_classes=10, in_channels=1, image_size=8, pyramid_channels=16)
    wide.save(tmp_path / "wide")
    with pytest.raises(InputError, match=r"another network .* settings: pyramid_channels was 16, now 8"):
        train(stage, tmp_path / "d", start=tmp_path / "wide", device="cpu")
    assert not any((tmp_path / name).exists() for name in "abcd")


def test_the_recipe_trains_adversarially_at_its_own_radius() -> None:
    assert recipe("mnist/mini").adversarial.eps == 0.3


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("objective", ["madry", "trades", "mart"])
def test_every_objective_trains_and_resumes_with_the_average_of_the_weights(
    tmp_path: Path, objective: str, baseline: bool
) -> None:
    options = {"start": "scratch", "objective": objective, "ema": 0.9, "awp": 0.005, "label_smoothing": 0.1}
    config = _run(**options).baseline() if baseline else _run(**options)
    stage = config.model_copy(update={"stage": "adversarial"})
    whole = train(stage, tmp_path / "whole", device="cpu")
    assert [m.adversarial_ce is not None and m.adversarial_ce > 0 for m in whole.history] == [True] * 2
    shorter = stage.adversarial.model_copy(update={"epochs": 1})
    train(stage.model_copy(update={"adversarial": shorter}), tmp_path / "cut", device="cpu")
    stage.save(tmp_path / "cut" / "config.yaml")  # as if interrupted after its first epoch
    cut = train(stage, tmp_path / "cut", resume=True, device="cpu")
    assert cut.history[1].validation_ce == whole.history[1].validation_ce
    for name in ("last", "best"):
        a, b = (read_weights(tmp_path / run / "checkpoints" / name) for run in ("whole", "cut"))
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_best_checkpoint_is_the_moving_average_of_the_weights(
    checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[dict[str, torch.Tensor]] = []

    def recorded(model: torch.nn.Module, *args: object, **options: object) -> object:
        result = adversarial_step(model, *args, **options)  # type: ignore[arg-type]
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return result

    monkeypatch.setattr("robustfpd.training.loop.adversarial_step", recorded)
    config = _run(start="scratch", ema=0.6, epochs=1, activation_checkpointing=checkpointing)
    config = config.model_copy(update={"stage": "adversarial"})
    result = train(config, tmp_path / "run", device="cpu", precision="fp32")
    validation = validate(result.model, data.load(config.data).validation, 64, torch.device("cpu"))
    assert validation.ce == pytest.approx(result.history[0].validation_ce, rel=1e-4)
    best, last = (read_weights(tmp_path / "run" / "checkpoints" / name) for name in ("best", "last"))
    for name in weights[0]:
        key = name.removeprefix("_forward_module.")
        average = weights[0][name]  # the warm-up copies the first step
        for step, new in enumerate(weights[1:], 2):
            decay = min(0.6, 1 - step ** (-2 / 3))
            average = decay * average + (1 - decay) * new[name]
        assert torch.allclose(best[key], average, atol=1e-6), key
        assert torch.equal(last[key], weights[-1][name])


def test_single_step_training_stops_at_catastrophic_overfitting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attack, expected in (("fgsm-rs", 2), ("pgd", 4)):
        robust = iter([0.6, 0.01, 0.0, 0.0])
        monkeypatch.setattr("robustfpd.training.loop.robust_accuracy", lambda *_, robust=robust: next(robust))
        config = _run(start="scratch", attack=attack, epochs=4, optimizer={"lr": 0.01}, eps=0.02)
        result = train(config.model_copy(update={"stage": "adversarial"}), tmp_path / attack, device="cpu")
        assert len(result.history) == expected
        assert result.overfitted == (attack == "fgsm-rs")
        assert result.best_epoch == 0
    resumed = train(
        RunFolder(tmp_path / "fgsm-rs").config(), tmp_path / "fgsm-rs", resume=True, device="cpu"
    )  # a run that overfitted does not continue
    assert len(resumed.history) == 2


def _row(robust: float | None, under_attack: float | None, epoch: int) -> EpochMetrics:
    return EpochMetrics(
        epoch=epoch, ce=1.0, restoration=None, second_ce=None, second_restoration=None, adversarial_ce=1.0,
        gate_open=None,
        train_accuracy=0.9, train_adversarial_accuracy=under_attack, validation_accuracy=0.9,
        validation_robust_accuracy=robust, validation_ce=1.0, validation_restoration=None, lr=0.1,
        images_per_second=1.0, seconds=1.0,
    )  # fmt: skip


def test_the_robust_validation_accuracy_sees_through_saturated_logits() -> None:
    splits = data.load(DataConfig())
    model = build(splits.info.task, recipe("digits/mini").model.baseline())
    images = splits.validation.take(torch.arange(64))
    pixels, _ = images.floats()
    with torch.no_grad():
        labels = model.eval()(pixels).argmax(dim=1)
        for parameter in model.head.parameters():  # the softmax is 1 for the predicted class, and its gradient 0
            parameter.mul_(1e6)
    settings = AdversarialConfig(eps=0.5)
    args = (settings, 64, torch.device("cpu"), 0)
    assert robust_accuracy(model, ImageSet(images.images, labels), *args) < 0.1


def test_overfitting_is_a_fall_below_half_of_the_best_and_of_the_training_attack() -> None:
    def overfitted(*rows: tuple[float | None, float | None], classes: int = 10, **settings: Any) -> bool:
        config = AdversarialConfig(**{"attack": "fgsm-rs"} | settings)
        history = [_row(robust, under_attack, epoch) for epoch, (robust, under_attack) in enumerate(rows)]
        return catastrophic_overfitting(history, config, classes)

    fall = ((0.5, 0.6), (0.1, 0.9))
    assert overfitted(*fall)
    assert overfitted(*fall, attack="pgd", steps=1)
    assert not overfitted(*fall, attack="pgd", steps=2)
    assert not overfitted()
    assert not overfitted((None, 0.9))
    assert not overfitted((0.02, 0.9))  # the first epochs are not robust yet
    assert not overfitted((0.5, 0.6), (0.3, 0.9))
    assert not overfitted((0.5, 0.6), (0.1, 0.15))  # diverged, not overfitted
    assert not overfitted((0.11, 0.3), (0.02, 0.8))  # the best is that of guessing
    assert not overfitted(*fall, warmup=1.0)  # the attacks of the first epoch were weaker
    assert not overfitted(*fall, classes=3)


def test_labels_true_of_a_command_line_are_the_true_labels() -> None:
    assert recipe("digits/mini", ["adversarial.labels=true"]).adversarial.labels == "true"


@pytest.mark.parametrize(("objective", "labels"), [("mixed", "predicted"), ("madry", "true"), ("mart", "true")])
def test_the_attacked_labels_follow_the_objective_unless_they_are_set(objective: Any, labels: str) -> None:
    changes = [f"adversarial.objective={objective}", "adversarial.batch=joint"]
    assert recipe("digits/mini", changes).adversarial.labels == AdversarialConfig(objective=objective).labels == labels
    assert recipe("digits/mini", [*changes, "adversarial.labels=predicted"]).adversarial.labels == "predicted"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"objective": "trades", "batch": "halves"},
            "set adversarial.batch=joint or adversarial.objective=mixed$",
        ),
        (
            {"objective": "madry", "alpha_features": 1.0},
            "alpha_features requires a clean pass of the same images, found objective madry",
        ),
        ({"batch": "halves", "alpha_features": 1.0}, "alpha_features requires a clean pass"),
        (
            {"objective": "mart", "restored_scale": 255},
            "restored_scale applies to objective mixed only, found objective mart",
        ),
        (
            {"objective": "trades", "attack": "fgsm"},
            "attack fgsm starts at the image, where the divergence of",
        ),
        ({"attack": "fgsm-rs", "select_by": "clean"}, "attack fgsm-rs can overfit catastrophically, which only"),
        ({"objective": "mart", "restoration_target": "nothing"}, "restoration_target"),
        ({"objective": "madri"}, "objective"),
        (
            {"start_epoch": 1, "warmup": 1.5},
            r"eps reaches its value after start_epoch \+ warmup = 2.5 epochs, found epochs 2",
        ),
    ],
)
def test_combinations_without_a_meaning_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _run(**settings)
