from __future__ import annotations

import csv
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robustfpd import data
from robustfpd.config import RunConfig, TrainingConfig, parse
from robustfpd.data.noise import add_uniform_noise
from robustfpd.errors import InputError
from robustfpd.models import FPD, load
from robustfpd.models.checkpoint import read_weights
from robustfpd.training import EpochMetrics, Observer, Progress, RunFolder, train
from robustfpd.training.steps import Step, StepResult, Update, two_phase_step


def _config(**training: object) -> RunConfig:
    values = {"epochs": 3, "batch_size": 64, "noise": 0.1, "schedule": {"name": "one_cycle"}, **training}
    return parse(
        RunConfig,
        {
            "data": {"train_limit": 192, "augment": {"rotation": 10, "brightness": 0.1}},
            "model": {"pyramid_channels": 8, "dropout": 0.2},
            "training": values,
        },
    )


class _Interrupt:
    """Raises KeyboardInterrupt in the middle of an epoch, as Ctrl-C would."""

    def __init__(self, epoch: int, batch: int) -> None:
        self.epoch, self.batch = epoch, batch

    def __call__(self, progress: Progress) -> None:
        if (progress.epoch, progress.batch) == (self.epoch, self.batch):
            raise KeyboardInterrupt


@pytest.mark.parametrize("schedule", ["one_cycle", "plateau", "cosine"])
def test_resume_after_an_interrupt_ends_with_the_same_weights(tmp_path: Path, schedule: str) -> None:
    config = _config(schedule={"name": schedule, "patience": 0})
    whole = train(config, tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", device="cpu", observer=Observer(on_batch=_Interrupt(1, 2)))
    resumed = train(config, tmp_path / "cut", device="cpu", resume=True)
    for name in ("last", "best"):
        expected = read_weights(tmp_path / "whole" / "checkpoints" / name)
        found = read_weights(tmp_path / "cut" / "checkpoints" / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[k], found[k]) for k in expected)
    timing = ("seconds", "images_per_second")
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert {k: v for k, v in vars(a).items() if k not in timing} == {
            k: v for k, v in vars(b).items() if k not in timing
        }


def test_the_random_state_of_the_caller_neither_matters_nor_moves(tmp_path: Path) -> None:
    config = _config(epochs=1)
    torch.manual_seed(1)
    train(config, tmp_path / "a", device="cpu")
    torch.manual_seed(2)
    before = torch.get_rng_state()
    train(config, tmp_path / "b", device="cpu")
    assert torch.equal(before, torch.get_rng_state())
    a, b = (read_weights(tmp_path / name / "checkpoints" / "last") for name in ("a", "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    a = train(_config(epochs=1), tmp_path / "a", device="cpu").model.state_dict()
    b = train(_config(epochs=1).model_copy(update={"seed": 1}), tmp_path / "b", device="cpu").model.state_dict()
    assert any(not torch.equal(a[k], b[k]) for k in a)


def test_a_run_folder_is_complete(tmp_path: Path) -> None:
    seen: list[tuple[EpochMetrics, bool]] = []
    observer = Observer(on_epoch=lambda metrics, best: seen.append((metrics, best)))
    result = train(_config(), tmp_path / "run", device="cpu", observer=observer)
    folder = RunFolder(tmp_path / "run")
    assert folder.config() == _config()
    with folder.metrics_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["epoch"]) for r in rows] == [0, 1, 2]
    assert float(rows[-1]["validation_accuracy"]) == result.history[-1].validation_accuracy
    assert list((folder.path / "tensorboard").glob("events.*"))
    assert isinstance(result.model, FPD)
    assert not result.model.training
    best = max(range(3), key=lambda i: (result.history[i].validation_accuracy, -result.history[i].validation_ce))
    assert result.best_epoch == best
    assert [b for _, b in seen][best]
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load(folder.path)(x).logits, result.model(x).logits)


def test_training_learns_the_digits(tmp_path: Path) -> None:
    config = _config(epochs=12, batch_size=32, optimizer={"lr": 0.005}, early_stop_patience=None)
    config = config.model_copy(update={"data": config.data.model_copy(update={"train_limit": 600})})
    result = train(config, tmp_path / "run", device="cpu")
    assert result.history[result.best_epoch].validation_accuracy > 0.8
    first, last = result.history[0], result.history[-1]
    assert first.restoration is not None
    assert last.restoration is not None
    assert last.restoration < first.restoration


def test_early_stopping_stops(tmp_path: Path) -> None:
    config = _config(epochs=9, optimizer={"lr": 1e-9}, schedule={"name": "constant"}, early_stop_patience=1)
    result = train(config, tmp_path / "run", device="cpu")
    assert result.stopped_early
    assert len(result.history) < 9


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    train(_config(epochs=1), tmp_path / "run", device="cpu")
    before = (tmp_path / "run" / "checkpoints" / "last" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a run; continue it with --resume"):
        train(_config(epochs=1), tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / "checkpoints" / "last" / "model.safetensors").read_bytes() == before


def test_resume_with_other_settings_names_what_differs(tmp_path: Path) -> None:
    train(_config(epochs=1), tmp_path / "run", device="cpu")
    with pytest.raises(InputError, match=r"training\.noise was 0\.1, now 0\.2"):
        train(_config(epochs=1, noise=0.2), tmp_path / "run", device="cpu", resume=True)


def test_a_file_in_the_way_is_named_and_kept(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        train(_config(), tmp_path / "run", device="cpu")
    assert (tmp_path / "run").read_text() == "mine"


def test_an_unusable_device_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device 'toaster'"):
        train(_config(), tmp_path / "run", device="toaster")
    assert not (tmp_path / "run").exists()


def test_resume_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        train(_config(), tmp_path / "run", device="cpu", resume=True)
    assert not (tmp_path / "run").exists()


def test_divergence_is_named(tmp_path: Path) -> None:
    config = _config(epochs=2, optimizer={"name": "sgd", "lr": 1e30}, clip=None, schedule={"name": "constant"})
    with pytest.raises(InputError, match=r"epoch 1: .* lower training\.optimizer\.lr .* no checkpoint yet"):
        train(config, tmp_path / "run", device="cpu")


def test_divergence_keeps_the_checkpoints_from_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(images: Tensor, width: float, generator: torch.Generator, *_: object) -> Tensor:
        saved = (tmp_path / "run" / "checkpoints" / "last").is_dir()
        return add_uniform_noise(images, width, generator) * (float("nan") if saved else 1.0)

    monkeypatch.setattr("robustfpd.training.perturbations.add_uniform_noise", poisoned)
    with pytest.raises(InputError, match=r"epoch 2: .* checkpoints are from before|epoch 2: .* are from before"):
        train(_config(), tmp_path / "run", device="cpu")
    weights = read_weights(tmp_path / "run" / "checkpoints" / "last")
    assert all(bool(w.isfinite().all()) for w in weights.values())


def _state(tmp_path: Path) -> Path:
    train(_config(epochs=1), tmp_path / "run", device="cpu")
    return tmp_path / "run" / "checkpoints" / "last" / "training.pt"


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: b"\x80\x02", lambda b: b"hello world"])
def test_a_damaged_training_state_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    state = _state(tmp_path)
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(InputError, match=r"training\.pt is damaged"):
        train(_config(epochs=1), tmp_path / "run", device="cpu", resume=True)


def test_a_foreign_training_state_is_named(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, _state(tmp_path))
    with pytest.raises(InputError, match=r"training\.pt is damaged: it does not hold history, optimizer"):
        train(_config(epochs=1), tmp_path / "run", device="cpu", resume=True)


def test_a_resume_without_the_last_checkpoint_does_not_start_over(tmp_path: Path) -> None:
    shutil.rmtree(_state(tmp_path).parent)
    before = (tmp_path / "run" / "metrics.csv").read_bytes()
    with pytest.raises(InputError, match=r"last is missing, though .*metrics\.csv tells of whole epochs"):
        train(_config(epochs=1), tmp_path / "run", device="cpu", resume=True)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == before


def test_each_step_gets_augmented_images_and_the_same_with_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(settings: TrainingConfig, unit: float) -> Step:
        step = two_phase_step(settings, unit)

        def watching(
            model: nn.Module, clean: Tensor, perturbed: Tensor | None, labels: Tensor, update: Update, index: int = 0
        ) -> StepResult:
            assert perturbed is not None
            assert index == len(seen)
            seen.append((clean, perturbed))
            return step(model, clean, perturbed, labels, update, index)

        return watching

    monkeypatch.setattr("robustfpd.training.loop.two_phase_step", watched)
    config = _config(epochs=1, noise=0.1)
    train(config, tmp_path / "run", device="cpu")
    clean, noisy = (torch.cat(parts) for parts in zip(*seen, strict=True))
    change = noisy - clean
    assert len(clean) == 192
    assert 0.095 < float(change.max()) <= 0.1 + 1e-6
    assert -0.1 - 1e-6 <= float(change.min()) < -0.095
    assert float(change.mean().abs()) < 0.005
    given, _ = data.load(config.data).train.floats()
    as_given = (torch.cdist(clean.flatten(1), given.flatten(1)).amin(dim=1) < 1e-3).float().mean()
    assert as_given < 0.1  # rotated and brightened


def test_gradients_are_clipped_before_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    original = torch.optim.SGD.step

    def step(self: torch.optim.SGD, closure: None = None) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        original(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    config = _config(epochs=1, clip=0.01, optimizer={"name": "sgd", "lr": 1e-4}, schedule={"name": "constant"})
    train(config, tmp_path / "run", device="cpu")
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


class Partly(nn.Module):
    """A user's network whose batch norm he froze."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.norm(self.stem(x)))
        return out


@pytest.mark.parametrize("frozen", [True, False])
def test_what_the_user_froze_stays_frozen(tmp_path: Path, frozen: bool) -> None:
    net = Partly()
    net.norm.train(not frozen)
    config = _config(epochs=1)
    model = config.model.model_copy(update={"backbone": "custom", "stages": ("norm", "block")})
    result = train(config.model_copy(update={"model": model}), tmp_path / "run", net=net, device="cpu")
    state = result.model.state_dict()
    assert torch.equal(state["backbone.net.norm.running_mean"], torch.zeros(4)) is frozen
    assert not torch.equal(state["backbone.net.block.1.running_mean"], torch.zeros(8))


def test_a_network_handed_over_in_evaluation_mode_is_trained_all_the_same(tmp_path: Path) -> None:
    config = _config(epochs=1)
    model = config.model.model_copy(update={"backbone": "custom", "stages": ("norm", "block")})
    result = train(config.model_copy(update={"model": model}), tmp_path / "run", net=Partly().eval(), device="cpu")
    assert not torch.equal(result.model.state_dict()["backbone.net.norm.running_mean"], torch.zeros(4))


def test_a_run_without_validation_images_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config()
    splits = data.load(config.data)
    nothing = splits.validation.take(torch.arange(0))
    monkeypatch.setattr("robustfpd.data.load", lambda _: dataclasses.replace(splits, validation=nothing))
    with pytest.raises(InputError, match="too few to hold any out for validation"):
        train(config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
