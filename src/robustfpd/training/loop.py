"""The training loop: epochs of one stage, validation, checkpoints and resume."""

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
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from robustfpd import data
from robustfpd.config import Precision, RunConfig
from robustfpd.data.image_set import batches, batches_per_epoch
from robustfpd.data.transforms import augment
from robustfpd.device import resolve_precision
from robustfpd.distributed import ProcessGroup, average_batch_norm_statistics, init_process_group, shared_errors
from robustfpd.errors import InputError, first_line
from robustfpd.io import write_csv
from robustfpd.models import FPD, Baseline, load
from robustfpd.models.checkpoint import read_settings, read_weights
from robustfpd.rng import derive, generator
from robustfpd.training.adversarial_step import adversarial_step
from robustfpd.training.fabric import FabricUpdate, checkpoint_activations, launch
from robustfpd.training.metrics import (
    EarlyStopping,
    EpochMetrics,
    EpochSums,
    Observer,
    Progress,
    TrainResult,
    Validation,
    catastrophic_overfitting,
    robust_accuracy,
    validate,
)
from robustfpd.training.optim import Schedule, make_optimizer, parameter_groups
from robustfpd.training.perturbations import adversarial_images, noisy_images
from robustfpd.training.run_folder import RunFolder, build_model, check_ranks, load_splits
from robustfpd.training.steps import (
    StepResult,
    backbone_step,
    baseline_step,
    restoration_unit,
    two_phase_step,
)


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
    """Train one stage of a run and write its folder.

    Args:
        config: data, model and procedure; `config.stage` selects the stage.
        out_dir: the run's folder; must not hold another run. By convention the adversarial stage is in the folder
            `adversarial` of the two-phase run.
        net: the user's own module when `config.model.backbone` is `custom`.
        start: run or saved model that the initial weights come from; None starts with new weights, which the
            adversarial stage does only where `config.adversarial.start` is `scratch`.
        resume: continue an interrupted run of the same config after its last finished epoch. On the CPU in fp32 the
            final weights equal those of an uninterrupted run.
        device: Fabric's accelerator: `auto`, `cpu`, `cuda`, `mps`; or one GPU, `cuda:1`.
        precision: `bf16` computes the network's products in bfloat16 and keeps weights and losses in float32; `auto`
            does so where the device has instructions for it, else `fp32`.
        observer: callbacks for a live display.

    Raises:
        InputError: unusable settings, a folder that holds something else, or a start that does not fit.
    """
    if config.stage == "adversarial" and (start is None) != (config.adversarial.start == "scratch"):
        raise InputError(
            "the adversarial stage begins with a checkpoint: pass start=, or set adversarial.start=scratch"
            if start is None
            else f"adversarial.start is scratch, found start={start}; leave one of them out"
        )
    folder = RunFolder(out_dir)
    with _without_warnings():
        group = init_process_group(device)
        check_ranks(group, config, out_dir, start, resume)
        with shared_errors():
            fabric = launch(config, device, precision, folder.path)
            splits = load_splits(config, group.world_size)
            model = build_model(config, splits, net, start, group.world_size)
            if group.is_main:
                arithmetic = resolve_precision(precision, fabric.device)
                folder.begin(config, resume, fabric.device, splits, start, arithmetic)
        training = _Training(config, folder, splits, model, fabric, observer or Observer())
        if resume:
            training.restore()
        training.run()
        backbone = read_settings(folder.best)[1].backbone  # a resumed folder may hold files of another origin
        best = load(folder.best, net=net, trust_code=backbone == config.model.backbone)
    return TrainResult(
        best, training.history, training.stopping.best_epoch, training.stopping.exhausted, training.overfitted
    )


class _Training:
    """One training: its state, and the methods in the order in which they run."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, splits: data.Splits, model: FPD | Baseline, fabric: Fabric,
        observer: Observer,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.splits, self.fabric, self.observer = config, folder, splits, fabric, observer
        self.settings = settings = config.procedure
        self.group = ProcessGroup.current()
        self.batches_per_epoch = batches_per_epoch(len(splits.train), settings.batch_size)
        self.frozen = [m for m in model.modules() if not m.training]
        model.to(fabric.device)
        # Before checkpointing, which replaces methods: the average's would be those of the model.
        self.average = ModelEmaV3(model, settings.ema, use_warmup=True) if settings.ema else None
        if settings.activation_checkpointing:
            checkpoint_activations(model)
        self.raw_model, self.model = model, fabric.setup_module(model)
        optimizer = make_optimizer(parameter_groups(model), settings.optimizer)
        self.optimizer: Any = fabric.setup_optimizers(optimizer)
        self.update = FabricUpdate(fabric, self.model, self.optimizer, settings.clip_grad_norm)
        self.schedule = Schedule(optimizer, settings.schedule, self.batches_per_epoch * settings.epochs)
        self.stopping = EarlyStopping(settings.early_stop_patience)
        self.history: list[EpochMetrics] = []

    def run(self) -> None:
        """Train, validate and save epoch by epoch."""
        for epoch in range(len(self.history), self.settings.epochs):
            if self.stopping.exhausted or self.overfitted:
                break
            lr = self.optimizer.param_groups[0]["lr"]
            start = time.perf_counter()
            means = self._train_epoch(epoch).means(self.group)
            seconds = time.perf_counter() - start
            if self.group.world_size > 1 and not self.settings.sync_batchnorm:
                average_batch_norm_statistics(self.raw_model)
                if self.average is not None:
                    average_batch_norm_statistics(self.average.module)
            validation, robust = self._validate()
            with shared_errors():
                self._check_finite(epoch, {**means, "validation_ce": validation.ce})
            metrics = EpochMetrics(
                epoch=epoch, **means, validation_accuracy=validation.accuracy, validation_ce=validation.ce,
                validation_restoration=validation.restoration, validation_robust_accuracy=robust, lr=lr,
                images_per_second=self.batches_per_epoch * self._images_per_batch / seconds, seconds=seconds,
            )  # fmt: skip
            accuracy = validation.accuracy if robust is None else robust
            loss = validation.loss if self.settings.schedule.follows == "loss" else validation.ce
            best = not self._restores(epoch, self.batches_per_epoch - 1) or self.stopping.better(epoch, accuracy, loss)
            self.schedule.after_epoch(accuracy, loss)
            self.history.append(metrics)
            self._save(best)
            self.observer.on_epoch(metrics, best)

    def _train_epoch(self, epoch: int) -> EpochSums:
        """Run the epoch's steps. Every random draw comes from the run's seed and the epoch."""
        seed, device, train = self.config.seed, self.fabric.device, self.splits.train
        # Draws for whole batches are equal on all ranks; dropout and starts of attacks differ.
        own = self.group.seed_purpose
        order = generator(seed, "order", epoch)
        augmentation = generator(seed, "augment", epoch, device=device)
        noise = generator(seed, "noise", epoch, *(own if self.config.stage == "adversarial" else ()), device=device)
        self.model.train()
        for module in self.frozen:  # a batch norm that the user froze keeps its statistics
            module.training = False
        sums, start = EpochSums(), time.perf_counter()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            on_gpu = [torch.cuda.default_generators[device.index or 0]] if device.type == "cuda" else []
            for default in (torch.default_generator, *on_gpu):  # dropout takes no generator of its own
                default.manual_seed(derive(seed, "dropout", epoch, *own))
            shuffled = batches(train, self.settings.batch_size, device, order, group=self.group)
            for index, (images, labels) in enumerate(shuffled):
                clean = augment(images, self.config.data.augment, augmentation, size=train.size, group=self.group)
                result = self._step(clean, labels, epoch, index, noise)
                self.schedule.after_batch()
                if self.average is not None:
                    self.average.update(self.raw_model, epoch * self.batches_per_epoch + index + 1)
                sums.add(result)
                self._report(epoch, index, time.perf_counter() - start, result, sums)
        return sums

    def _step(self, clean: Tensor, labels: Tensor, epoch: int, index: int, draws: torch.Generator) -> StepResult:
        """Perturb one batch and train on it."""
        model, raw_model, update, config = self.model, self.raw_model, self.update, self.config
        if config.stage == "adversarial":
            done = epoch + (index + 1) / self.batches_per_epoch
            with self.fabric.autocast():
                adversarial = adversarial_images(raw_model, clean, labels, config.adversarial, done, draws)
            return adversarial_step(
                model, clean, adversarial, labels, update, config.training, config.adversarial, index
            )
        noisy = noisy_images(raw_model, clean, config.training, draws, self.group)
        if isinstance(raw_model, FPD):
            if not self._restores(epoch, index):
                return backbone_step(model, clean, noisy, labels, update, config.training)
            return two_phase_step(model, clean, noisy, labels, update, config.training, index, draws)
        return baseline_step(model, noisy, labels, update, config.training)

    @property
    def evaluated(self) -> FPD | Baseline:
        """The model that is validated and saved as the best: the average of the weights, if there is one."""
        return self.raw_model if self.average is None else self.average.module

    @property
    def overfitted(self) -> bool:
        """Whether single-step adversarial training has overfitted catastrophically."""
        if self.config.stage != "adversarial":
            return False
        return catastrophic_overfitting(self.history, self.config.adversarial, self.splits.info.task.num_classes)

    def _restores(self, epoch: int, index: int) -> bool:
        """Return whether the restoration is trained on a batch; always, except at the start of two-phase training."""
        if self.config.stage == "adversarial" or not isinstance(self.raw_model, FPD):
            return True
        start = self.config.training.restoration_start * self.settings.epochs
        return epoch + index / self.batches_per_epoch >= start

    def _validate(self) -> tuple[Validation, float | None]:
        """Return clean metrics, and the robust accuracy where adversarial training selects its epoch by it."""
        images, batch_size, device = self.splits.validation, 2 * self.settings.batch_size, self.fabric.device
        unit, adversarial = restoration_unit(self.raw_model, self.config.training), self.config.adversarial
        model = self.evaluated
        validation = validate(self.model if self.average is None else model, images, batch_size, device, unit)
        if self.config.stage != "adversarial" or adversarial.select_by == "clean":
            return validation, None
        return validation, robust_accuracy(model, images, adversarial, batch_size, device, self.config.seed)

    def _check_finite(self, epoch: int, losses: dict[str, Any]) -> None:
        saved = f"The checkpoints in {self.folder.last.parent} are from before"
        checkpoints = saved if self.history else "There is no checkpoint yet"
        stage = "adversarial" if self.config.stage == "adversarial" else "training"
        for name, value in losses.items():
            if value is not None and not math.isfinite(value):
                raise InputError(
                    f"training diverged in epoch {epoch + 1}: {name} is {value}; lower {stage}.optimizer.lr "
                    f"or {stage}.clip_grad_norm. {checkpoints}"
                )

    @property
    def _images_per_batch(self) -> int:
        return min(self.settings.batch_size, len(self.splits.train))

    def _report(self, epoch: int, index: int, seconds: float, result: StepResult, sums: EpochSums) -> None:
        done = index + 1
        left = (self.settings.epochs - epoch) * self.batches_per_epoch - done
        self.observer.on_batch(
            Progress(
                epoch=epoch, epochs=self.settings.epochs, batch=done, batches=self.batches_per_epoch,
                images_per_second=done * self._images_per_batch / seconds, seconds_left=left * seconds / done,
                step=result, correct=sums.correct, seen=sums.counted,
            )
        )  # fmt: skip

    def _save(self, best: bool) -> None:
        """Write checkpoints and metrics, on rank 0."""
        state = {
            "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(),
            "stopping": asdict(self.stopping), "history": [asdict(m) for m in self.history],
        }  # fmt: skip
        if self.average is not None:
            state["average"] = self.average.module.state_dict()
        with shared_errors():
            if not self.group.is_main:
                return
            if best:
                self.folder.save_checkpoint(self.folder.best, self.evaluated)
            self.folder.save_checkpoint(self.folder.last, self.raw_model, state)
            write_csv(self.folder.metrics_file, state["history"])
            logged = {k: v for k, v in state["history"][-1].items() if v is not None and k != "epoch"}
            self.fabric.log_dict(logged, step=self.history[-1].epoch)

    def restore(self) -> None:
        """Load the state after the last finished epoch; without one, keep the initial state."""
        with shared_errors():
            saved = self.folder.training_state()
        epochs = set(self.group.gather(0 if saved is None else len(saved["history"])))
        if len(epochs) > 1:
            raise InputError(
                f"the ranks see {sorted(epochs)} finished epochs in {self.folder.path}; it must be on a file system "
                "that all nodes share"
            )
        if saved is None:
            return
        try:
            self.raw_model.load_state_dict(read_weights(self.folder.last))
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            if self.average is not None:
                self.average.module.load_state_dict(saved["average"])
            self.stopping = EarlyStopping(**saved["stopping"])
            self.history = [EpochMetrics(**row) for row in saved["history"]]
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{self.folder.last} was written by another version of robustfpd and cannot be resumed "
                f"({first_line(error)}); its weights still load; start in another folder"
            ) from None
        if self.group.is_main:
            write_csv(self.folder.metrics_file, saved["history"])  # the interrupt may have come before


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hide libraries' warnings that a user cannot act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
        warnings.filterwarnings("ignore", module="lightning.*")
        yield
