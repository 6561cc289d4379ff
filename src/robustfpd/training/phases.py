"""One training step: the two-phase procedure with its gate, and the plain twin's.

Li et al., CVPR 2020: while the restoration loss is above the threshold T only the front pass and
the restoration learn; below it everything learns, then once more from the restored image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.config import TrainingConfig
from robustfpd.models import FPD, Plain
from robustfpd.training.objectives import first_objective, pass_losses, second_objective

Update = Callable[[Tensor], None]
"""Takes a loss: clears gradients, runs the backward pass, clips, steps the optimiser."""


@dataclass(frozen=True)
class StepResult:
    """What one step saw. Losses are scalars without a graph; None where a phase has none."""

    ce: Tensor
    restoration: Tensor | None
    second_ce: Tensor | None
    second_restoration: Tensor | None
    gate_open: bool
    correct: Tensor
    """Number of noisy training images classified rightly."""


class Step(Protocol):
    """A training step on one batch."""

    def __call__(self, model: nn.Module, clean: Tensor, noisy: Tensor, labels: Tensor, update: Update) -> StepResult:
        """Train `model` on a batch through `update`."""


def two_phase_step(config: TrainingConfig) -> Step:
    """Return the step of two-phase training under `config`."""

    def step(model: nn.Module, clean: Tensor, noisy: Tensor, labels: Tensor, update: Update) -> StepResult:
        first = model(noisy)
        losses = pass_losses(first.logits, first.restored, clean, labels)
        correct = (first.logits.argmax(dim=1) == labels).sum()
        if bool(losses.restoration > config.threshold):
            # The head and the back pass are not in this loss's graph: their gradients stay None,
            # so the optimiser leaves them, weight decay and momentum included, as they are.
            update(config.alpha_restore * losses.restoration)
            return StepResult(losses.ce.detach(), losses.restoration.detach(), None, None, False, correct)
        if config.second_pass == "joint":
            again = model(first.restored)
            second = pass_losses(again.logits, again.restored, clean, labels)
            update(first_objective(losses, config) + second_objective(second, config))
        else:
            update(first_objective(losses, config))
            again = model(first.restored.detach())
            second = pass_losses(again.logits, again.restored, clean, labels)
            update(second_objective(second, config))
        return StepResult(
            losses.ce.detach(), losses.restoration.detach(), second.ce.detach(), second.restoration.detach(), True,
            correct,
        )  # fmt: skip

    return step


def plain_step(config: TrainingConfig) -> Step:
    """Return the twin's step: cross-entropy on the same noisy images."""

    def step(model: nn.Module, clean: Tensor, noisy: Tensor, labels: Tensor, update: Update) -> StepResult:
        logits = model(noisy)
        loss = F.cross_entropy(logits, labels)
        update(config.alpha_ce * loss)
        correct = (logits.argmax(dim=1) == labels).sum()
        return StepResult(loss.detach(), None, None, None, True, correct)

    return step


def parameter_groups(model: FPD | Plain) -> list[dict[str, Any]]:
    """Split parameters into those the shut gate trains (front pass and restoration) and the head's."""
    head = list(model.head.parameters())
    in_head = {id(p) for p in head}
    rest = [p for p in model.parameters() if id(p) not in in_head]
    return [{"params": rest, "name": "front_and_restoration"}, {"params": head, "name": "head"}]
