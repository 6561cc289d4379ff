"""The training loop on Lightning Fabric: epochs, validation, checkpoints, resume."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from torch import Tensor, nn

from robustfpd import data
from robustfpd.config import RunConfig
from robustfpd.data.batches import batches, batches_per_epoch
from robustfpd.data.noise import add_uniform_noise
from robustfpd.data.transforms import augment
from robustfpd.errors import InputError
from robustfpd.models import FPD, FPDOutput, Plain, build, load
from robustfpd.models.checkpoint import read_weights
from robustfpd.models.mode import evaluating
from robustfpd.seeding import derive, generator
from robustfpd.training.early_stopping import EarlyStopping
from robustfpd.training.optimizers import Schedule, make_optimizer
from robustfpd.training.phases import StepResult, parameter_groups, plain_step, two_phase_step
from robustfpd.training.run_folder import RunFolder


@dataclass(frozen=True)
class EpochMetrics:
    """One row of metrics.csv. Losses are means over the epoch's batches; None where there is no such phase."""

    epoch: int
    ce: float
    restoration: float | None
    second_ce: float | None
    second_restoration: float | None
    gate_open: float
    """Share of batches with the gate open."""
    train_accuracy: float
    """On the noisy, augmented images as they were trained on."""
    validation_accuracy: float
    validation_ce: float
    validation_restoration: float | None
    lr: float
    images_per_second: float
    seconds: float


@dataclass(frozen=True)
class Progress:
    """Where training stands, for whoever displays it."""

    epoch: int
    epochs: int
    batch: int
    batches: int
    images_per_second: float
    seconds_left: float
    step: StepResult
    correct: Tensor
    """Noisy images of this epoch classified rightly so far; a tensor, so that only a display waits for it."""
    seen: int


@dataclass(frozen=True)
class TrainResult:
    """A finished training."""

    model: FPD | Plain
    """The best checkpoint's model, in evaluation mode, on the CPU."""
    history: list[EpochMetrics]
    best_epoch: int
    stopped_early: bool


@dataclass
class Observer:
    """Callbacks for a display; each does nothing unless set."""

    on_batch: Callable[[Progress], None] = field(default=lambda progress: None)
    on_epoch: Callable[[EpochMetrics, bool], None] = field(default=lambda metrics, best: None)


def train(
    config: RunConfig,
    out_dir: str | Path,
    *,
    net: nn.Module | None = None,
    resume: bool = False,
    device: str = "auto",
    precision: str = "32-true",
    observer: Observer | None = None,
) -> TrainResult:
    """Train the model of a run and leave its folder complete.

    Args:
        config: what to train, on what, how.
        out_dir: the run's folder; must not hold another run.
        net: the user's own module when `config.model.backbone` is `custom`.
        resume: go on after the last whole epoch of an interrupted run with the same config. On the CPU
            in fp32 the weights end equal to those of an uninterrupted run.
        device: Fabric's accelerator: `auto`, `cpu`, `cuda`, `mps`; or one GPU, `cuda:1`.
        precision: Fabric's precision.
        observer: callbacks for a live display.

    Raises:
        InputError: unusable settings, or a folder that holds something else.
    """
    folder = RunFolder(out_dir)
    splits = data.load(config.data)
    model = build(splits.info.task, config.model, net=net, seed=config.seed)
    with _quiet():
        fabric = _fabric(device, precision, folder)
        folder.begin(config, resume, fabric.device)
        return _Training(config, folder, splits, model, fabric, observer or Observer()).run(net, resume)


class _Training:
    """State of one training; `run` is the loop."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, splits: data.Splits, model: FPD | Plain, fabric: Fabric,
        observer: Observer,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.splits, self.fabric, self.observer = config, folder, splits, fabric, observer
        settings = config.training
        self.batches = batches_per_epoch(len(splits.train), settings.batch_size)
        self.step = two_phase_step(settings) if isinstance(model, FPD) else plain_step(settings)
        self.raw_model = model
        self.frozen = [m for m in model.modules() if not m.training]
        optimizer = make_optimizer(parameter_groups(model), settings.optimizer)
        self.model, self.optimizer = fabric.setup(model, optimizer)
        self.schedule = Schedule(optimizer, settings.schedule, self.batches * settings.epochs)
        self.stopping = EarlyStopping(settings.early_stop_patience)
        self.history: list[EpochMetrics] = []

    def run(self, net: nn.Module | None, resume: bool) -> TrainResult:
        if resume:
            self._restore()
        for epoch in range(len(self.history), self.config.training.epochs):
            if self.stopping.exhausted:
                break
            metrics = self._epoch(epoch)
            best = self.stopping.better(epoch, metrics.validation_accuracy, metrics.validation_ce)
            self.schedule.after_epoch(metrics.validation_accuracy)
            self.history.append(metrics)
            self._save(best)
            self.observer.on_epoch(metrics, best)
        model = load(self.folder.best, net=net)
        return TrainResult(model, self.history, self.stopping.best_epoch, self.stopping.exhausted)

    def _epoch(self, epoch: int) -> EpochMetrics:
        seed, settings, device = self.config.seed, self.config.training, self.fabric.device
        order = generator(seed, "order", epoch)
        draws = {purpose: generator(seed, purpose, epoch, device=device) for purpose in ("noise", "augment")}
        sums, seen, start = _Sums(), 0, time.perf_counter()
        lr = self.optimizer.param_groups[0]["lr"]
        self._train_mode()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for source in _default_generators(device):  # dropout takes no generator of its own
                source.manual_seed(derive(seed, "dropout", epoch))
            for index, (clean, labels) in enumerate(batches(self.splits.train, settings.batch_size, device, order)):
                clean = augment(clean, self.config.data.augment, draws["augment"])
                noisy = add_uniform_noise(clean, settings.noise, draws["noise"])
                result = self.step(self.model, clean, noisy, labels, self._update)
                self.schedule.after_batch()
                sums.add(result)
                seen += len(labels)
                self._report(epoch, index, seen, time.perf_counter() - start, result, sums)
        seconds = time.perf_counter() - start
        accuracy, ce, restoration = self._validate()
        self._check_finite(epoch, {**sums.means(), "validation_ce": ce})
        return EpochMetrics(
            epoch=epoch, **sums.means(), train_accuracy=float(sums.correct) / seen, validation_accuracy=accuracy,
            validation_ce=ce, validation_restoration=restoration, lr=lr, images_per_second=seen / seconds,
            seconds=seconds,
        )  # fmt: skip

    def _train_mode(self) -> None:
        """Training mode for all but what the user froze: a batch norm in evaluation mode keeps its statistics."""
        self.model.train()
        for module in self.frozen:
            module.training = False

    def _check_finite(self, epoch: int, losses: dict[str, Any]) -> None:
        checkpoints = self.folder.path / "checkpoints"
        kept = f"The checkpoints in {checkpoints} are from before" if self.history else "There is no checkpoint yet"
        for name, value in losses.items():
            if value is not None and not math.isfinite(value):
                raise InputError(
                    f"training diverged in epoch {epoch + 1}: {name} is {value}; lower training.optimizer.lr "
                    f"or training.clip. {kept}"
                )

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        if self.config.training.clip is not None:
            # Infinite gradients are reported with the epoch's losses, where a message can say what to do.
            self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.config.training.clip, error_if_nonfinite=False
            )
        self.optimizer.step()

    def _report(self, epoch: int, index: int, seen: int, seconds: float, result: StepResult, sums: _Sums) -> None:
        speed = seen / seconds
        left = (self.config.training.epochs - epoch) * self.batches - index - 1
        self.observer.on_batch(
            Progress(
                epoch=epoch, epochs=self.config.training.epochs, batch=index + 1, batches=self.batches,
                images_per_second=speed, seconds_left=left * seconds / (index + 1), step=result,
                correct=sums.correct, seen=seen,
            )
        )  # fmt: skip

    @torch.no_grad()
    def _validate(self) -> tuple[float, float, float | None]:
        """Accuracy, cross-entropy and restoration loss on clean validation images."""
        right, ce, restoration, count = 0, 0.0, 0.0, len(self.splits.validation)
        with evaluating(self.model):
            for images, labels in batches(
                self.splits.validation, 2 * self.config.training.batch_size, self.fabric.device
            ):
                out = self.model(images)
                logits = out.logits if isinstance(out, FPDOutput) else out
                right += int((logits.argmax(dim=1) == labels).sum())
                ce += float(F.cross_entropy(logits, labels, reduction="sum"))
                if isinstance(out, FPDOutput):
                    restoration += float(F.mse_loss(out.restored, images)) * len(images)
        return right / count, ce / count, restoration / count if isinstance(self.raw_model, FPD) else None

    def _save(self, best: bool) -> None:
        state = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state(),
            "stopping": self.stopping.state(),
            "history": [asdict(m) for m in self.history],
        }
        if best:
            self.folder.save_checkpoint(self.folder.best, self.raw_model)
        self.folder.save_checkpoint(self.folder.last, self.raw_model, state)
        self.folder.write_metrics([asdict(m) for m in self.history])
        logged = {k: v for k, v in asdict(self.history[-1]).items() if v is not None and k != "epoch"}
        self.fabric.log_dict(logged, step=self.history[-1].epoch)

    def _restore(self) -> None:
        state = self.folder.training_state()
        if state is None and self.folder.metrics_file.is_file():
            raise InputError(
                f"{self.folder.last} is missing, though {self.folder.metrics_file} tells of whole epochs; put it back, "
                "or start in another folder"
            )
        if state is None:
            return
        self.raw_model.load_state_dict(read_weights(self.folder.last))
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.restore(state["schedule"])
        self.stopping = EarlyStopping(**state["stopping"])
        self.history = [EpochMetrics(**row) for row in state["history"]]
        self.folder.write_metrics(state["history"])  # the interrupt may have come before


class _Sums:
    """Running sums of an epoch, kept on the device until the epoch's end."""

    def __init__(self) -> None:
        self._losses: dict[str, list[Tensor]] = {}
        self._open = 0
        self._batches = 0
        self.correct = torch.zeros((), dtype=torch.long)

    def add(self, result: StepResult) -> None:
        for name in ("ce", "restoration", "second_ce", "second_restoration"):
            loss = getattr(result, name)
            if loss is not None:
                self._losses.setdefault(name, []).append(loss)
        self.correct = self.correct.to(result.correct.device) + result.correct
        self._open += result.gate_open
        self._batches += 1

    def means(self) -> dict[str, Any]:
        names = ("ce", "restoration", "second_ce", "second_restoration")
        means = {n: float(torch.stack(self._losses[n]).mean()) if n in self._losses else None for n in names}
        return {**means, "gate_open": self._open / self._batches}


def _fabric(device: str, precision: str, folder: RunFolder) -> Fabric:
    logger = TensorBoardLogger(root_dir=folder.path, name="tensorboard", version="")
    accelerator, _, index = device.partition(":")
    devices = [int(index)] if index.isdecimal() else 1
    try:
        return Fabric(accelerator=accelerator, devices=devices, precision=precision, loggers=logger)  # type: ignore[arg-type]
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} with precision {precision!r} cannot be used here: {reason}") from None


def _default_generators(device: torch.device) -> list[torch.Generator]:
    """Torch's own generators that layers on `device` draw from."""
    if device.type == "cuda":
        return [torch.default_generator, torch.cuda.default_generators[device.index or 0]]
    return [torch.default_generator]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries' notices, which tell the user nothing he could act on, off the display."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
        warnings.filterwarnings("ignore", module="lightning.*")
        yield
