"""Metrics of a training: one row per epoch, progress for a display, the result, and early stopping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustfpd.distributed import SINGLE_PROCESS, ProcessGroup
from robustfpd.models import FPD, Baseline
from robustfpd.training.steps import StepResult


@dataclass(frozen=True)
class EpochMetrics:
    """One row of metrics.csv. Losses are means over the epoch's batches; None where the training has no such loss."""

    epoch: int
    ce: float
    restoration: float | None
    second_ce: float | None
    second_restoration: float | None
    adversarial_ce: float | None
    gate_open: float
    """Fraction of batches with the gate open."""
    train_accuracy: float
    """Accuracy on the noisy, augmented images during training; in adversarial training on the clean ones."""
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
        names = ("ce", "restoration", "second_ce", "second_restoration", "adversarial_ce")
        self._losses: dict[str, list[Tensor]] = {name: [] for name in names}
        self._open = 0
        self._batches = 0
        self.correct = torch.zeros((), dtype=torch.long)
        self.counted = 0
        self._adversarial_correct = torch.zeros((), dtype=torch.long)
        self._adversarial_counted = 0

    def add(self, result: StepResult) -> None:
        """Add one step."""
        for prefix, losses in (("", result.first), ("second_", result.second), ("adversarial_", result.adversarial)):
            for name in ("ce", "restoration") if losses is not None else ():
                loss = getattr(losses, name)
                if loss is not None and prefix + name in self._losses:
                    self._losses[prefix + name].append(loss)
        self.correct = self.correct.to(result.first.correct.device) + result.first.correct
        self.counted += result.first.counted
        if result.adversarial is not None:
            correct = result.adversarial.correct
            self._adversarial_correct = self._adversarial_correct.to(correct.device) + correct
            self._adversarial_counted += result.adversarial.counted
        self._open += result.gate_open
        self._batches += 1

    def means(self, group: ProcessGroup = SINGLE_PROCESS) -> dict[str, Any]:
        """Return means under the names of `EpochMetrics`, over the ranks of `group`, which have equally many images."""
        counted = self._adversarial_counted
        own: dict[str, Any] = {
            **{name: float(torch.stack(values).mean()) if values else None for name, values in self._losses.items()},
            "gate_open": self._open / self._batches,
            "train_accuracy": float(self.correct) / self.counted,
            "train_adversarial_accuracy": float(self._adversarial_correct) / counted if counted else None,
        }
        ranks = group.gather(own)
        return {n: None if own[n] is None else sum(r[n] for r in ranks) / len(ranks) for n in own}


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

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, which the constructor takes."""
        return asdict(self)
