"""One step of adversarial training, the second stage, for an FPD and for its undefended baseline.

Half of the loss is on clean images, half on adversarial ones. Then once more from the restored adversarial images,
as in two-phase training (Li et al., CVPR 2020; adversarial training after Madry et al., ICLR 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.config import AdversarialConfig, TrainingConfig
from robustfpd.models import FPDOutput
from robustfpd.training.objectives import PassLosses, first_objective, pass_losses
from robustfpd.training.steps import Step, StepResult, Update, gate_open, gated, second_phase


@dataclass(frozen=True)
class _Part:
    """Clean or adversarial images of a batch after a pass; `restored` is None in the undefended baseline."""

    target: Tensor
    labels: Tensor
    logits: Tensor
    restored: Tensor | None

    def objective(self, config: TrainingConfig, unit: Tensor | float, scale: float = 1.0) -> Tensor:
        if self.restored is None:
            return config.alpha_ce * F.cross_entropy(self.logits, self.labels)
        losses = pass_losses(self.logits, scale * self.restored, self.target, self.labels, unit)
        return first_objective(losses, config)

    def part(self, which: slice) -> _Part:
        restored = None if self.restored is None else self.restored[which]
        return _Part(self.target[which], self.labels[which], self.logits[which], restored)

    def ce(self) -> Tensor:
        return F.cross_entropy(self.logits.detach(), self.labels)

    def correct(self) -> Tensor:
        return (self.logits.argmax(dim=1) == self.labels).sum()


def adversarial_step(config: TrainingConfig, settings: AdversarialConfig, unit: Tensor | float = 1.0) -> Step:
    """Return the step of adversarial training; the first stage's `config` gives weights, gate and second pass.

    `unit` is that of the restoration loss, in pixels. The step's `perturbed` are what `perturbation.adversary` made
    under the same settings; None, before the start epoch, trains on clean images alone.
    """

    def step(
        model: nn.Module, clean: Tensor, perturbed: Tensor | None, labels: Tensor, update: Update, index: int = 0
    ) -> StepResult:
        parts, restored = _passes(model, clean, perturbed, labels, settings)
        first, scale = parts[0], settings.restored_scale
        restoration = None if first.restored is None else F.mse_loss(scale * first.restored / unit, first.target / unit)
        if restoration is not None and settings.gate and not gate_open(restoration, config):
            update(config.alpha_restore * restoration, only=gated(config))
            return _result(parts, restoration, None, gate_open=False)
        objectives = [first.objective(config, unit, scale), *(part.objective(config, unit) for part in parts[1:])]
        loss = torch.stack(objectives).mean()
        once = not settings.second_pass or index % config.second_pass_interval > 0
        if restored is None or perturbed is None or once:
            update(loss)
            return _result(parts, restoration, None)
        return _result(parts, restoration, second_phase(model, restored, clean, labels, loss, config, update, unit))

    return step


def _passes(
    model: nn.Module, clean: Tensor, perturbed: Tensor | None, labels: Tensor, settings: AdversarialConfig
) -> tuple[list[_Part], Tensor | None]:
    """Run a batch: one part of clean images and, if any, one of adversarial ones; and what goes through once more."""
    if perturbed is None:
        part = _part(model(clean), clean, labels)
        return [part], part.restored
    itself = settings.restoration_target == "input"
    if settings.batch == "both":
        parts = [_part(model(clean), clean, labels), _part(model(perturbed), perturbed if itself else clean, labels)]
        return parts, parts[1].restored
    half = len(clean) - len(perturbed)
    images = torch.cat([clean[:half], perturbed])
    whole = _part(model(images), images if itself else clean, labels)
    return [whole.part(slice(0, half)), whole.part(slice(half, None))], whole.restored


def _part(out: FPDOutput | Tensor, target: Tensor, labels: Tensor) -> _Part:
    if isinstance(out, FPDOutput):
        return _Part(target, labels, out.logits, out.restored)
    return _Part(target, labels, out, None)


def _result(
    parts: list[_Part], restoration: Tensor | None, second: PassLosses | None, gate_open: bool = True
) -> StepResult:
    """What the step saw; accuracy is that on the clean images."""
    return StepResult(
        ce=parts[0].ce(),
        restoration=None if restoration is None else restoration.detach(),
        second_ce=None if second is None else second.ce.detach(),
        second_restoration=None if second is None else second.restoration.detach(),
        gate_open=gate_open,
        correct=parts[0].correct(),
        counted=len(parts[0].labels),
        adversarial_ce=parts[1].ce() if len(parts) > 1 else None,
        adversarial_correct=parts[1].correct() if len(parts) > 1 else None,
        adversarial_counted=len(parts[1].labels) if len(parts) > 1 else 0,
    )
