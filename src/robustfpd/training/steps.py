"""One training step: the two-phase procedure with its gate, and the undefended baseline's.

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
from robustfpd.distributed import ProcessGroup
from robustfpd.models import FPD, Baseline, FPDOutput
from robustfpd.training.objectives import PassLosses, first_objective, pass_losses, second_objective

GROUPS = ("front_and_pyramid", "upscaling", "head")
"""Names of the parameter groups: FPD_FD with its pyramid, the transposed convolutions, the classification layer."""


class Update(Protocol):
    """Clears gradients, runs the backward pass, clips all gradients together, steps the optimiser."""

    def __call__(self, loss: Tensor, *, only: frozenset[str] | None = None, keep_graph: bool = False) -> None:
        """Step on `loss`.

        Args:
            loss: a scalar.
            only: names of the parameter groups that step; None lets all step that the loss reaches.
            keep_graph: a later loss goes back through this loss's graph, although the weights in it have moved.
        """


@dataclass(frozen=True)
class StepResult:
    """What one step saw. Losses are scalars without a graph; None where a phase has none."""

    ce: Tensor
    restoration: Tensor | None
    second_ce: Tensor | None
    second_restoration: Tensor | None
    gate_open: bool
    correct: Tensor
    """Number of training images (noisy, or the clean ones of adversarial training) classified correctly."""
    counted: int
    """Of how many."""
    adversarial_ce: Tensor | None = None
    adversarial_correct: Tensor | None = None
    """Number of adversarial training images classified correctly."""
    adversarial_counted: int = 0


class Step(Protocol):
    """A training step on one batch."""

    def __call__(
        self, model: nn.Module, clean: Tensor, perturbed: Tensor | None, labels: Tensor, update: Update, index: int = 0
    ) -> StepResult:
        """Train `model` on a batch, the epoch's `index`-th, through `update`; `perturbed` are noisy or adversarial."""


def two_phase_step(config: TrainingConfig, unit: Tensor | float = 1.0) -> Step:
    """Return the step of two-phase training under `config`; `unit` is that of the restoration loss, in pixels."""

    def step(
        model: Any, clean: Tensor, perturbed: Tensor | None, labels: Tensor, update: Update, index: int = 0
    ) -> StepResult:
        assert perturbed is not None
        shared = config.second_pass == "shared"
        first, maps = model.with_maps(perturbed) if shared else (model(perturbed), None)
        losses = pass_losses(first.logits, first.restored, clean, labels, unit)
        correct = (first.logits.argmax(dim=1) == labels).sum()
        ce, restoration = losses.ce.detach(), losses.restoration.detach()
        if not gate_open(losses.restoration, config):
            update(config.alpha_restore * losses.restoration, only=gated(config))
            return StepResult(ce, restoration, None, None, False, correct, len(labels))
        loss = first_objective(losses, config)
        if index % config.second_pass_interval:
            update(loss)
            return StepResult(ce, restoration, None, None, True, correct, len(labels))
        again = None if maps is None else lambda: model.again(maps, first.restored)
        second = second_phase(model, first.restored, clean, labels, loss, config, update, unit, again=again)
        return StepResult(ce, restoration, second.ce.detach(), second.restoration.detach(), True, correct, len(labels))

    return step


def second_phase(
    model: nn.Module, restored: Tensor, clean: Tensor, labels: Tensor, loss: Tensor, config: TrainingConfig,
    update: Update, unit: Tensor | float = 1.0, *, again: Callable[[], FPDOutput] | None = None,
) -> PassLosses:  # fmt: skip
    """Step on phase 1's `loss`, and on phase 2's, from the restored images, as `config.second_pass` says.

    `again` gives what phase 2 gives where it is not the whole model on the restored images.
    """
    if config.second_pass in ("joint", "shared"):
        out = again() if again is not None else model(restored)
        second = pass_losses(out.logits, out.restored, clean, labels, unit)
        update(loss + second_objective(second, config))
        return second
    through = config.second_pass == "through"
    update(loss, keep_graph=through)
    out = model(restored if through else restored.detach())
    second = pass_losses(out.logits, out.restored, clean, labels, unit)
    update(second_objective(second, config))
    return second


def gate_open(restoration: Tensor, config: TrainingConfig) -> bool:
    """Return whether the mean restoration loss over all ranks is at most the threshold T."""
    return not bool(ProcessGroup.current().all_reduce_mean(restoration) > config.threshold)


def gated(config: TrainingConfig) -> frozenset[str]:
    """Names of the groups that step behind the shut gate."""
    if config.gate_trains == "upscaling":
        return frozenset({"upscaling"})
    return frozenset({"front_and_pyramid", "upscaling"})


def baseline_step(config: TrainingConfig) -> Step:
    """Return the baseline's step: cross-entropy on the same noisy images."""

    def step(
        model: nn.Module, clean: Tensor, perturbed: Tensor | None, labels: Tensor, update: Update, index: int = 0
    ) -> StepResult:
        assert perturbed is not None
        logits = model(perturbed)
        loss = F.cross_entropy(logits, labels)
        update(config.alpha_ce * loss)
        correct = (logits.argmax(dim=1) == labels).sum()
        return StepResult(loss.detach(), None, None, None, True, correct, len(labels))

    return step


def parameter_groups(model: FPD | Baseline) -> list[dict[str, Any]]:
    """Split parameters into GROUPS, which the gate tells apart; a undefended baseline has no decoder."""
    members: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    upscaling = {id(p) for p in model.decoder.upscale.parameters()} if isinstance(model, FPD) else set()
    head = {id(p) for p in model.head.parameters()}
    for p in model.parameters():
        members["upscaling" if id(p) in upscaling else "head" if id(p) in head else "front_and_pyramid"].append(p)
    return [{"params": params, "name": name} for name, params in members.items() if params]
