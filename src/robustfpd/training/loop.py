"""The training loop on Lightning Fabric: epochs, validation, checkpoints, resume."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from robustfpd import data
from robustfpd.config import Precision, RunConfig
from robustfpd.data.batches import batches, batches_per_epoch
from robustfpd.data.transforms import augment
from robustfpd.device import resolve_precision
from robustfpd.distributed import ProcessGroup, average_batch_norm_statistics, init_process_group, shared_errors
from robustfpd.errors import InputError, first_line
from robustfpd.models import FPD, Baseline, load
from robustfpd.models.checkpoint import read_settings, read_weights
from robustfpd.rng import derive, generator
from robustfpd.training.activation_checkpointing import checkpoint_blocks
from robustfpd.training.adversarial import adversarial_step
from robustfpd.training.early_stopping import EarlyStopping
from robustfpd.training.fabric import launch
from robustfpd.training.metrics import EpochMetrics, EpochSums, Observer, Progress, TrainResult
from robustfpd.training.optim import Schedule, make_optimizer
from robustfpd.training.perturbations import adversary, noise
from robustfpd.training.run_folder import RunFolder
from robustfpd.training.setup import check_ranks, prepared
from robustfpd.training.sharding import gathered, load_optimizer_state, load_weights, whole_weights, with_whole_weights
from robustfpd.training.stepping import Stepper
from robustfpd.training.steps import StepResult, baseline_step, parameter_groups, two_phase_step
from robustfpd.training.validation import robust_accuracy, validate


def train(
    config: RunConfig,
    out_dir: str | Path,
    *,
    net: nn.Module | None = None,
    start: str | Path | None = None,
    resume: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    observer: Observer | None = None,
) -> TrainResult:
    """Train one stage of a run and leave its folder complete.

    Args:
        config: what to train, on what, how; `config.stage` says which stage.
        out_dir: the run's folder; must not hold another run. By custom the adversarial stage lies in the folder
            `adversarial` of the two-phase run.
        net: the user's own module when `config.model.backbone` is `custom`.
        start: run or saved model whose weights to begin with; None begins with new weights, which the adversarial
            stage does only where `config.adversarial.start` is `scratch`.
        resume: go on after the last whole epoch of an interrupted run with the same config. On the CPU
            in fp32 the weights end equal to those of an uninterrupted run.
        device: Fabric's accelerator: `auto`, `cpu`, `cuda`, `mps`; or one GPU, `cuda:1`.
        precision: `bf16` runs the network's products in bfloat16, weights and losses stay float32; `auto` does so
            where the device is quick at it, else `fp32`.
        observer: callbacks for a live display.

    Raises:
        InputError: unusable settings, a folder that holds something else, or a start that does not fit.
    """
    folder = RunFolder(out_dir)
    if config.stage == "adversarial" and (start is None) != (config.adversarial.start == "scratch"):
        raise InputError(
            "the adversarial stage begins with a checkpoint: pass start=, or set adversarial.start=scratch"
            if start is None
            else f"adversarial.start is scratch, found start={start}; leave one of them out"
        )
    with _quiet():
        check_ranks(init_process_group(device), config, out_dir, start, resume)
        with shared_errors():
            fabric = launch(config, device, precision, folder.path)
            splits, model = prepared(config, net, start)
            if fabric.is_global_zero:
                folder.begin(config, resume, fabric.device, splits, start, resolve_precision(precision, fabric.device))
        return _Training(config, folder, splits, model, fabric, observer or Observer()).run(net, resume)


class _Training:
    """State of one training; `run` is the loop."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, splits: data.Splits, model: FPD | Baseline, fabric: Fabric,
        observer: Observer,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.splits, self.fabric, self.observer = config, folder, splits, fabric, observer
        settings, self.group = config.procedure, ProcessGroup.current()
        self.settings = settings
        self.batches = batches_per_epoch(len(splits.train), settings.batch_size)
        self.adversarial = config.stage == "adversarial"
        self.raw_model = model
        self.frozen = [m for m in model.modules() if not m.training]
        self.own_statistics = self.group.world_size > 1 and not settings.sync_batchnorm
        if settings.activation_checkpointing:
            checkpoint_blocks(model)
        self.model = fabric.setup_module(model)  # first: FSDP makes other parameters
        optimizer = make_optimizer(parameter_groups(model), settings.optimizer)
        for method in ("with_maps", "again") if isinstance(model, FPD) else ():
            self.model.mark_forward_method(method)
        self.optimizer: Any = fabric.setup_optimizers(optimizer)
        self.update = Stepper(fabric, self.model, self.optimizer, settings.clip_grad_norm)
        # After the set-up, which may move the model to another device.
        unit = self.unit = model.std if config.training.space == "normalised" else 1.0
        if self.adversarial:
            self.perturb = with_whole_weights(adversary(config.adversarial))
            self.step = adversarial_step(config.training, config.adversarial, unit)
        else:
            self.perturb = noise(config.training, unit, self.group)
            two_phase = isinstance(model, FPD)
            self.step = two_phase_step(config.training, unit) if two_phase else baseline_step(config.training)
        self.schedule = Schedule(optimizer, settings.schedule, self.batches * settings.epochs)
        self.stopping = EarlyStopping(settings.early_stop_patience)
        self.history: list[EpochMetrics] = []

    def run(self, net: nn.Module | None, resume: bool) -> TrainResult:
        if resume:
            self._restore()
        for epoch in range(len(self.history), self.settings.epochs):
            if self.stopping.exhausted:
                break
            metrics, score, loss = self._epoch(epoch)
            best = self.stopping.better(epoch, score, loss)
            self.schedule.after_epoch(score, loss)
            self.history.append(metrics)
            self._save(best)
            self.observer.on_epoch(metrics, best)
        named = read_settings(self.folder.best)[1].backbone  # a resumed folder may hold what it did not write
        model = load(self.folder.best, net=net, trust_code=named == self.config.model.backbone)
        return TrainResult(model, self.history, self.stopping.best_epoch, self.stopping.exhausted)

    def _epoch(self, epoch: int) -> tuple[EpochMetrics, float, float]:
        """Train and validate; return the row, and the accuracy and the loss that epochs are compared by."""
        seed, device = self.config.seed, self.fabric.device
        order = generator(seed, "order", epoch)
        # Draws that are not of a whole batch differ between ranks: dropout, starts of attacks.
        own = self.group.seed_purpose
        draws = {
            "augment": generator(seed, "augment", epoch, device=device),
            "noise": generator(seed, "noise", epoch, *(own if self.adversarial else ()), device=device),
        }
        sums, start = EpochSums(), time.perf_counter()
        lr = self.optimizer.param_groups[0]["lr"]
        self._train_mode()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for source in _default_generators(device):  # dropout takes no generator of its own
                source.manual_seed(derive(seed, "dropout", epoch, *own))
            train = self.splits.train
            shuffled = batches(train, self.settings.batch_size, device, order, group=self.group)
            for index, (clean, labels) in enumerate(shuffled):
                augmenting = self.config.data.augment
                clean = augment(clean, augmenting, draws["augment"], size=train.size, group=self.group)
                done = epoch + (index + 1) / self.batches
                with self.fabric.autocast():
                    perturbed = self.perturb(self.raw_model, clean, labels, done, draws["noise"])
                result = self.step(self.model, clean, perturbed, labels, self.update, index)
                self.schedule.after_batch()
                sums.add(result)
                self._report(epoch, index, time.perf_counter() - start, result, sums)
        seconds = time.perf_counter() - start
        means = sums.means(self.group)
        if self.own_statistics:
            average_batch_norm_statistics(self.raw_model)
        with whole_weights(self.raw_model):
            validation = validate(self.model, self.splits.validation, 2 * self.settings.batch_size, device, self.unit)
            robust = self._robust_accuracy()
        with shared_errors():
            self._check_finite(epoch, {**means, "validation_ce": validation.ce})
        metrics = EpochMetrics(
            epoch=epoch, **means, validation_accuracy=validation.accuracy, validation_ce=validation.ce,
            validation_restoration=validation.restoration, validation_robust_accuracy=robust, lr=lr,
            images_per_second=self.batches * min(self.settings.batch_size, len(train)) / seconds, seconds=seconds,
        )  # fmt: skip
        follows_loss = self.settings.schedule.follows == "loss"
        score = validation.accuracy if robust is None else robust
        return metrics, score, validation.loss if follows_loss else validation.ce

    def _robust_accuracy(self) -> float | None:
        """What adversarial training picks its epoch by; None where clean accuracy does."""
        settings = self.config.adversarial
        if not self.adversarial or settings.select_by == "clean":
            return None
        return robust_accuracy(
            self.raw_model, self.splits.validation, settings, 2 * self.settings.batch_size, self.fabric.device,
            self.config.seed,
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
                stage = "adversarial" if self.adversarial else "training"
                raise InputError(
                    f"training diverged in epoch {epoch + 1}: {name} is {value}; lower {stage}.optimizer.lr "
                    f"or {stage}.clip_grad_norm. {kept}"
                )

    def _report(self, epoch: int, index: int, seconds: float, result: StepResult, sums: EpochSums) -> None:
        done = index + 1
        left = (self.settings.epochs - epoch) * self.batches - done
        self.observer.on_batch(
            Progress(
                epoch=epoch, epochs=self.settings.epochs, batch=done, batches=self.batches,
                images_per_second=done * min(self.settings.batch_size, len(self.splits.train)) / seconds,
                seconds_left=left * seconds / done, step=result, correct=sums.correct, seen=sums.counted,
            )
        )  # fmt: skip

    def _save(self, best: bool) -> None:
        state = {
            "optimizer": gathered(self.optimizer.state_dict()),
            "schedule": self.schedule.state(),
            "stopping": self.stopping.state(),
            "history": [asdict(m) for m in self.history],
        }
        weights = gathered(dict(self.raw_model.state_dict()))
        with shared_errors():
            if self.group.is_main:
                self._write(best, weights, state)

    def _write(self, best: bool, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        if best:
            self.folder.save_checkpoint(self.folder.best, self.raw_model, weights)
        self.folder.save_checkpoint(self.folder.last, self.raw_model, weights, state)
        self.folder.write_metrics([asdict(m) for m in self.history])
        logged = {k: v for k, v in asdict(self.history[-1]).items() if v is not None and k != "epoch"}
        self.fabric.log_dict(logged, step=self.history[-1].epoch)

    def _saved(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """State and weights of the last whole epoch; None before there was one."""
        state = self.folder.training_state()
        if state is None and self.folder.metrics_file.is_file():
            raise InputError(
                f"{self.folder.last} is missing, though {self.folder.metrics_file} tells of whole epochs; put it back, "
                "or start in another folder"
            )
        return None if state is None else (state, read_weights(self.folder.last))

    def _restore(self) -> None:
        with shared_errors():
            saved = self._saved()
        begun = self.group.gather(0 if saved is None else len(saved[0]["history"]))
        if len(set(begun)) > 1:
            raise InputError(
                f"the ranks see {sorted(set(begun))} whole epochs in {self.folder.path}; it must be on a file "
                "system that all nodes share"
            )
        if saved is None:
            return
        state, weights = saved
        try:
            load_weights(self.raw_model, weights)
            load_optimizer_state(self.optimizer, state["optimizer"])
            self.schedule.restore(state["schedule"])
            self.stopping = EarlyStopping(**state["stopping"])
            self.history = [EpochMetrics(**row) for row in state["history"]]
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.folder.last} was written by another version of robustfpd and cannot be resumed "
                f"({first_line(error)}); its weights still load; start in another folder"
            ) from None
        if self.group.is_main:
            self.folder.write_metrics(state["history"])  # the interrupt may have come before


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
        # The restored images are cut to size; nothing is written into them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        yield
