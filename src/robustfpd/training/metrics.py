"""Metrics of a training: validation, one row per epoch, progress for a display, the result, and early stopping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.attacks import pgd
from robustfpd.config import AdversarialConfig
from robustfpd.data import ImageSet
from robustfpd.data.image_set import batches
from robustfpd.device import evaluating
from robustfpd.distributed import SINGLE_PROCESS, ProcessGroup
from robustfpd.models import FPD, Baseline, FPDOutput
from robustfpd.rng import generator
from robustfpd.training.perturbations import attacked_view
from robustfpd.training.steps import StepResult

PGD_STEPS = 10


@dataclass(frozen=True)
class EpochMetrics:
    """One row of metrics.csv. Losses are means over the epoch's batches; None where the training has no such loss."""

    epoch: int
    ce: float
    restoration: float | None
    second_ce: float | None
    second_restoration: float | None
    adversarial_ce: float | None
    gate_open: float | None
    """Fraction of batches with the gate open; None where the backbone is trained alone."""
    train_accuracy: float
    """Accuracy on the noisy, augmented images during training; in adversarial training on the clean ones, or with the
    objective `madry` on the adversarial ones."""
    train_adversarial_accuracy: float | None
    """Accuracy under the training attack, before each step."""
    validation_accuracy: float
    validation_robust_accuracy: float | None
    """Accuracy under PGD-10 on `adversarial.select_images` images; an upper bound, for selecting the epoch only."""
    validation_ce: float
    validation_restoration: float | None
    lr: float
    images_per_second: float
    seconds: float
    gate_opened: int | None = None
    """Number of the epoch's first batch with the gate open; None while it is shut."""


@dataclass(frozen=True)
class Progress:
    """Position of a training and its last step, for a display."""

    epoch: int
    epochs: int
    batch: int
    batches: int
    images_per_second: float
    seconds_left: float
    step: StepResult
    correct: Tensor
    """Count of training images classified correctly in this epoch; a tensor, so that only a display waits for it."""
    seen: int
    """Count of those images."""


@dataclass(frozen=True)
class TrainResult:
    """A finished training."""

    model: FPD | Baseline
    """Model of the best checkpoint, in evaluation mode, on the CPU."""
    history: list[EpochMetrics]
    best_epoch: int
    stopped_early: bool
    overfitted: bool = False
    """Whether single-step adversarial training stopped because it overfitted catastrophically."""


@dataclass
class Observer:
    """Callbacks for a display; by default they do nothing."""

    on_batch: Callable[[Progress], None] = field(default=lambda progress: None)
    on_epoch: Callable[[EpochMetrics, bool], None] = field(default=lambda metrics, best: None)


class EpochSums:
    """Losses and counts of an epoch, kept on the device until its end.

    Not torchmetrics, which gathers each metric in a message of its own: here the ranks exchange one message per epoch,
    and the device never waits within it.
    """

    def __init__(self) -> None:
        self._steps: list[StepResult] = []
        self.correct = torch.zeros((), dtype=torch.long)
        self.counted = 0

    def add(self, result: StepResult) -> None:
        """Add one step."""
        self._steps.append(result)
        self.correct = self.correct.to(result.first.correct.device) + result.first.correct
        self.counted += result.first.counted

    def means(self, group: ProcessGroup = SINGLE_PROCESS) -> dict[str, Any]:
        """Return means under the names of `EpochMetrics`, over the ranks of `group`, which have equally many images."""
        first = [step.first for step in self._steps]
        second = [step.second for step in self._steps if step.second is not None]
        adversarial = [step.adversarial for step in self._steps if step.adversarial is not None]
        gates = [step.gate_open for step in self._steps if step.gate_open is not None]
        attacked = sum(losses.counted for losses in adversarial)
        own: dict[str, Any] = {
            "ce": _mean([losses.ce for losses in first]),
            "restoration": _mean([losses.restoration for losses in first]),
            "second_ce": _mean([losses.ce for losses in second]),
            "second_restoration": _mean([losses.restoration for losses in second]),
            "adversarial_ce": _mean([losses.ce for losses in adversarial]),
            "gate_open": sum(gates) / len(gates) if gates else None,
            "gate_opened": next((i for i, step in enumerate(self._steps, 1) if step.gate_open), None),
            "train_accuracy": float(self.correct) / self.counted,
            "train_adversarial_accuracy": float(sum(a.correct for a in adversarial)) / attacked if attacked else None,
        }
        ranks = group.gather(own)
        means = {n: None if own[n] is None else sum(r[n] for r in ranks) / len(ranks) for n in own}
        return means | {"gate_opened": own["gate_opened"]}  # equal on all ranks, which share the gate


def _mean(losses: Sequence[Tensor | None]) -> float | None:
    present = [loss for loss in losses if loss is not None]
    return float(torch.stack(present).mean()) if present else None


@dataclass
class EarlyStopping:
    """Stops after `patience` epochs without a better one; among equal accuracies the lower loss is better.

    On small splits accuracies are often equal. Without patience it never stops.
    """

    patience: int | None
    best: float = -1.0
    best_loss: float = float("inf")
    best_epoch: int = -1
    epoch: int = -1

    def better(self, epoch: int, accuracy: float, loss: float) -> bool:
        """Record an epoch; return whether it is the best so far."""
        self.epoch = epoch
        if (accuracy, -loss) <= (self.best, -self.best_loss):
            return False
        self.best, self.best_loss, self.best_epoch = accuracy, loss, epoch
        return True

    @property
    def exhausted(self) -> bool:
        """Whether `patience` epochs have passed without a better one."""
        return self.patience is not None and self.epoch - self.best_epoch >= self.patience


def catastrophic_overfitting(history: Sequence[EpochMetrics], config: AdversarialConfig, num_classes: int) -> bool:
    """Return whether the last epoch of single-step training overfitted catastrophically (Wong et al., ICLR 2020).

    The validation accuracy under PGD is below half of its best, and below half of the accuracy under the training's
    single-step attack. Epochs count from the full radius on, once the best accuracy is twice that of guessing.
    """
    if config.attack == "pgd" and config.steps > 1:
        return False
    full = [m for m in history if m.epoch >= config.start_epoch + config.warmup]
    robust = [m.validation_robust_accuracy for m in full if m.validation_robust_accuracy is not None]
    under_attack = full[-1].train_adversarial_accuracy if full else None
    if not robust or under_attack is None or max(robust) < 2 / num_classes:
        return False
    return robust[-1] < max(robust) / 2 and robust[-1] < under_attack / 2


@dataclass(frozen=True)
class Validation:
    """Accuracy and mean losses on clean images; no restoration loss for a baseline."""

    accuracy: float
    ce: float
    restoration: float | None

    @property
    def loss(self) -> float:
        """Cross-entropy plus restoration loss, which the published schedule follows."""
        return self.ce + (self.restoration or 0.0)


@torch.no_grad()
def validate(
    model: nn.Module, images: ImageSet, batch_size: int, device: torch.device, unit: Tensor | float = 1.0
) -> Validation:
    """Evaluate a model on clean images, sharded over the ranks; `unit` is that of the restoration loss."""
    correct, ce, restoration, restores, count = 0, 0.0, 0.0, False, len(images)
    group = ProcessGroup.current()
    shard = images.take(torch.arange(count)[group.shard(count)])
    with evaluating(model):
        for clean, labels in batches(shard, batch_size, device) if len(shard) else ():
            output = model(clean)
            logits: Tensor = output.logits if isinstance(output, FPDOutput) else output
            correct += int((logits.argmax(dim=1) == labels).sum())
            ce += float(F.cross_entropy(logits, labels, reduction="sum"))
            if isinstance(output, FPDOutput):
                restores = True
                restoration += float(F.mse_loss(output.restored / unit, clean / unit)) * len(clean)
    ranks = group.gather((correct, ce, restoration, restores))
    correct, ce, restoration, restores = (sum(column) for column in zip(*ranks, strict=True))
    return Validation(correct / count, ce / count, restoration / count if restores else None)


def robust_accuracy(
    model: FPD | Baseline, images: ImageSet, config: AdversarialConfig, batch_size: int, device: torch.device, seed: int
) -> float:
    """Return the accuracy under PGD-10 at `config.eps` on `config.select_images` images drawn by `seed`.

    The attack maximizes the margin, because the gradient of the cross-entropy vanishes for saturated logits. It
    differentiates `config.view`; success is measured on the model's own logits. Selection by robust accuracy follows
    Rice et al., ICML 2020. Images are sharded over the ranks, and each rank draws its own random starts.
    """
    group = ProcessGroup.current()
    selected = torch.randperm(len(images), generator=generator(seed, "select"))[: config.select_images].sort().values
    shard = images.take(selected[group.shard(len(selected))])
    draws = generator(seed, "select-attack", *group.seed_purpose)
    classifier, attacked, robust = model.classifier(), attacked_view(model, config), 0
    with evaluating(model):
        for clean, labels in batches(shard, batch_size, device) if len(shard) else ():
            adversarial = pgd(
                attacked, clean, labels, eps=config.eps, norm=config.norm, steps=PGD_STEPS, loss="margin",
                generator=draws,
            )  # fmt: skip
            with torch.no_grad():
                predictions = [classifier(x).argmax(dim=1) for x in (clean, adversarial)]
            robust += int(((predictions[0] == labels) & (predictions[1] == labels)).sum())
    return sum(group.gather(robust)) / len(selected)
