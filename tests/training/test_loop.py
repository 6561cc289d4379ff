from __future__ import annotations

import csv
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustfpd import data
from robustfpd.config import RunConfig, parse
from robustfpd.errors import InputError
from robustfpd.models import FPD, load
from robustfpd.models.checkpoint import read_weights
from robustfpd.training import EpochMetrics, Observer, Progress, RunFolder, TrainResult, train
from robustfpd.training.metrics import Validation
from robustfpd.training.steps import StepResult, backbone_step, two_phase_step


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


@dataclasses.dataclass
class Finished:
    """A finished training, which tests must not change."""

    config: RunConfig
    folder: Path
    result: TrainResult
    epochs: list[tuple[EpochMetrics, bool]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Eight epochs on 600 digits."""
    config = _config(epochs=8, batch_size=32, optimizer={"lr": 0.005}, early_stop_patience=None)
    config = config.model_copy(update={"data": config.data.model_copy(update={"train_limit": 600})})
    folder, epochs = tmp_path_factory.mktemp("runs") / "finished", list[tuple[EpochMetrics, bool]]()
    observer = Observer(on_epoch=lambda metrics, best: epochs.append((metrics, best)))
    return Finished(config, folder, train(config, folder, device="cpu", observer=observer), epochs)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of one epoch, which tests copy."""
    folder: Path = tmp_path_factory.mktemp("runs") / "short"
    train(_config(epochs=1), folder, device="cpu")
    return folder


@pytest.fixture
def run(short: Path, tmp_path: Path) -> Path:
    """A copy of `short`."""
    return Path(shutil.copytree(short, tmp_path / "run"))


@pytest.mark.parametrize("start", [0.0, 0.25, 0.5, 0.75])
def test_the_backbone_is_trained_alone_before_the_restoration_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: float
) -> None:
    kinds = list[str]()

    def recorded(kind: str, step: Callable[..., StepResult]) -> Callable[..., StepResult]:
        def run(*given: Any) -> StepResult:
            kinds.append(kind)
            return step(*given)

        return run

    for kind, step in (("alone", backbone_step), ("both", two_phase_step)):
        monkeypatch.setattr(f"robustfpd.training.loop.{step.__name__}", recorded(kind, step))
    accuracies = iter([0.9, 0.8])
    monkeypatch.setattr(
        "robustfpd.training.loop.validate", lambda *_: Validation(accuracy=next(accuracies), ce=1.0, restoration=1.0)
    )
    result = train(_config(epochs=2, batch_size=96, restoration_start=start), tmp_path / "run", device="cpu")
    alone = int(4 * start)
    assert kinds == ["alone"] * alone + ["both"] * (4 - alone)
    assert result.best_epoch == alone // 2  # the first one that trains the restoration
    assert [m.gate_opened for m in result.history] == [max(0, alone - 2 * i) + 1 if alone < 2 * i + 2 else None
                                                       for i in range(2)]  # fmt: skip


@pytest.mark.parametrize("schedule", ["one_cycle", "plateau", "cosine"])
def test_resume_after_an_interrupt_ends_with_the_same_weights(tmp_path: Path, schedule: str) -> None:
    config = _config(schedule={"name": schedule, "patience": 0}, epochs=2)
    whole = train(config, tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "cut", device="cpu", observer=Observer(on_batch=_Interrupt(1, 2)))
    resumed = train(config, tmp_path / "cut", device="cpu", resume=True)
    for name in ("last", "best"):
        assert _equal(tmp_path / "whole", tmp_path / "cut", name)
    timing = ("seconds", "images_per_second")
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert {k: v for k, v in vars(a).items() if k not in timing} == {
            k: v for k, v in vars(b).items() if k not in timing
        }


def _equal(a: Path, b: Path, name: str = "last") -> bool:
    first, second = (read_weights(run / "checkpoints" / name) for run in (a, b))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_random_state_of_the_caller_neither_matters_nor_changes(short: Path, tmp_path: Path) -> None:
    torch.manual_seed(2)
    before = torch.get_rng_state()
    train(_config(epochs=1), tmp_path / "again", device="cpu")
    assert torch.equal(before, torch.get_rng_state())
    assert _equal(short, tmp_path / "again")
    train(_config(epochs=1).model_copy(update={"seed": 1}), tmp_path / "other seed", device="cpu")
    assert not _equal(short, tmp_path / "other seed")


def test_a_run_folder_is_complete(finished: Finished) -> None:
    result, folder = finished.result, RunFolder(finished.folder)
    assert folder.config() == finished.config
    with folder.metrics_file.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["epoch"]) for r in rows] == list(range(8))
    assert float(rows[-1]["validation_accuracy"]) == result.history[-1].validation_accuracy
    assert list((folder.path / "tensorboard").glob("events.*"))
    assert isinstance(result.model, FPD)
    assert not result.model.training
    best = max(range(8), key=lambda i: (result.history[i].validation_accuracy, -result.history[i].validation_ce))
    assert result.best_epoch == best
    assert [b for _, b in finished.epochs][best]
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load(folder.path)(x).logits, result.model(x).logits)


def test_training_learns_the_digits(finished: Finished) -> None:
    result = finished.result
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


def test_a_folder_with_a_run_is_not_overwritten(run: Path) -> None:
    before = (run / "checkpoints" / "last" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a run; continue it with --resume"):
        train(_config(epochs=1), run, device="cpu")
    assert (run / "checkpoints" / "last" / "model.safetensors").read_bytes() == before


def test_resume_with_other_settings_names_what_differs(run: Path) -> None:
    with pytest.raises(InputError, match=r"training\.noise was 0\.1, now 0\.2"):
        train(_config(epochs=1, noise=0.2), run, device="cpu", resume=True)


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
    config = _config(
        epochs=2, optimizer={"name": "sgd", "lr": 1e30}, clip_grad_norm=None, schedule={"name": "constant"}
    )
    with pytest.raises(InputError, match=r"epoch 1: .* lower training\.optimizer\.lr .* no checkpoint yet"):
        train(config, tmp_path / "run", device="cpu")


def test_divergence_keeps_the_checkpoints_from_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(_: object, images: Tensor, *__: object) -> Tensor:
        saved = (tmp_path / "run" / "checkpoints" / "last").is_dir()
        return images * (float("nan") if saved else 1.0)

    monkeypatch.setattr("robustfpd.training.loop.noisy_images", poisoned)
    with pytest.raises(InputError, match=r"epoch 2: .* checkpoints in .* are from before"):
        train(_config(), tmp_path / "run", device="cpu")
    weights = read_weights(tmp_path / "run" / "checkpoints" / "last")
    assert all(bool(w.isfinite().all()) for w in weights.values())


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b"", lambda b: b"\x80\x02", lambda b: b"hello world"])
def test_a_damaged_training_state_is_named(run: Path, damage: Callable[[bytes], bytes]) -> None:
    state = run / "checkpoints" / "last" / "training.pt"
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(InputError, match=r"training\.pt is damaged"):
        RunFolder(run).training_state()


def test_a_training_state_of_another_origin_is_named(run: Path) -> None:
    torch.save({"weights": torch.ones(2)}, run / "checkpoints" / "last" / "training.pt")
    with pytest.raises(InputError, match=r"training\.pt is damaged: it does not hold history, optimizer"):
        train(_config(epochs=1), run, device="cpu", resume=True)


def test_a_resume_without_the_last_checkpoint_does_not_start_over(run: Path) -> None:
    shutil.rmtree(run / "checkpoints" / "last")
    before = (run / "metrics.csv").read_bytes()
    with pytest.raises(InputError, match=r"last is missing, though .*metrics\.csv lists finished epochs"):
        train(_config(epochs=1), run, device="cpu", resume=True)
    assert (run / "metrics.csv").read_bytes() == before


def test_each_step_gets_augmented_images_and_the_same_with_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def recorded(model: nn.Module, clean: Tensor, noisy: Tensor, *rest: Any) -> StepResult:
        assert rest[-2] == len(seen)
        seen.append((clean, noisy))
        return two_phase_step(model, clean, noisy, *rest)

    monkeypatch.setattr("robustfpd.training.loop.two_phase_step", recorded)
    config = _config(epochs=1, noise=0.1, restoration_start=0)
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
    config = _config(
        epochs=1, clip_grad_norm=0.01, optimizer={"name": "sgd", "lr": 1e-4}, schedule={"name": "constant"}
    )
    train(config, tmp_path / "run", device="cpu")
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


class UserNet(nn.Module):
    """A user's network with a batch norm that can be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.norm(self.stem(x)))
        return out


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_batch_norm_stays_frozen(tmp_path: Path, frozen: bool) -> None:
    net = UserNet()
    net.norm.train(not frozen)
    config = _config(epochs=1)
    model = config.model.model_copy(update={"backbone": "custom", "stages": ("norm", "block")})
    result = train(config.model_copy(update={"model": model}), tmp_path / "run", net=net, device="cpu")
    state = result.model.state_dict()
    assert torch.equal(state["backbone.net.norm.running_mean"], torch.zeros(4)) is frozen
    assert not torch.equal(state["backbone.net.block.1.running_mean"], torch.zeros(8))


def test_a_network_in_evaluation_mode_is_trained_all_the_same(tmp_path: Path) -> None:
    config = _config(epochs=1)
    model = config.model.model_copy(update={"backbone": "custom", "stages": ("norm", "block")})
    result = train(config.model_copy(update={"model": model}), tmp_path / "run", net=UserNet().eval(), device="cpu")
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
