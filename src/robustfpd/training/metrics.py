"""What a training tells: a row per epoch, where it stands, how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustfpd.distributed import SINGLE_PROCESS, ProcessGroup
from robustfpd.models import FPD, Baseline
from robustfpd.training.steps import StepResult


@dataclass(frozen=True)
class EpochMetrics:
    """One row of metrics.csv. Losses are means over the epoch's batches; None where there is no such phase."""

    epoch: int
    ce: float
    restoration: float | None
    second_ce: float | None
    second_restoration: float | None
    adversarial_ce: float | None
    gate_open: float
    """Share of batches with the gate open."""
    train_accuracy: float
    """On the noisy, augmented images as they were trained on; in adversarial training on the clean ones."""
    train_adversarial_accuracy: float | None
    """Under the training attack, before each step."""
    validation_accuracy: float
    validation_robust_accuracy: float | None
    """Under PGD-10, of the first `adversarial.select_images`; an upper bound, for picking the epoch only."""
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
    """Training images of this epoch classified correctly so far; a tensor, so that only a display waits for it."""
    seen: int
    """Of how many."""


@dataclass(frozen=True)
class TrainResult:
    """A finished training."""

    model: FPD | Baseline
    """The best checkpoint's model, in evaluation mode, on the CPU."""
    history: list[EpochMetrics]
    best_epoch: int
    stopped_early: bool


@dataclass
class Observer:
    """Callbacks for a display; each does nothing unless set."""

    on_batch: Callable[[Progress], None] = field(default=lambda progress: None)
    on_epoch: Callable[[EpochMetrics, bool], None] = field(default=lambda metrics, best: None)


class EpochSums:
    """Running sums of an epoch, kept on the device until the epoch's end."""

    LOSSES = ("ce", "restoration", "second_ce", "second_restoration", "adversarial_ce")

    def __init__(self) -> None:
        self._losses: dict[str, list[Tensor]] = {}
        self._open = 0
        self._batches = 0
        self.correct = torch.zeros((), dtype=torch.long)
        self.counted = 0
        self._adversarial = torch.zeros((), dtype=torch.long)
        self._adversarial_counted = 0

    def add(self, result: StepResult) -> None:
        """Take in one step."""
        for name in self.LOSSES:
            loss = getattr(result, name)
            if loss is not None:
                self._losses.setdefault(name, []).append(loss)
        self.correct = self.correct.to(result.correct.device) + result.correct
        self.counted += result.counted
        if result.adversarial_correct is not None:
            self._adversarial = self._adversarial.to(result.correct.device) + result.adversarial_correct
            self._adversarial_counted += result.adversarial_counted
        self._open += result.gate_open
        self._batches += 1

    def means(self, group: ProcessGroup = SINGLE_PROCESS) -> dict[str, Any]:
        """Return means by the names of EpochMetrics, over the ranks of `group`, which have equally many images."""
        means = {n: float(torch.stack(self._losses[n]).mean()) if n in self._losses else None for n in self.LOSSES}
        adversarial = float(self._adversarial) / self._adversarial_counted if self._adversarial_counted else None
        own: dict[str, Any] = {
            **means,
            "gate_open": self._open / self._batches,
            "train_accuracy": float(self.correct) / self.counted,
            "train_adversarial_accuracy": adversarial,
        }
        ranks = group.gather(own)
        return {n: None if own[n] is None else sum(r[n] for r in ranks) / len(ranks) for n in own}
