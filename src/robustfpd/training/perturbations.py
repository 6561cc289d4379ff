"""What training images suffer before the model sees them: uniform noise, or an attack."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from robustfpd.attacks import adaptive, fgsm, pgd
from robustfpd.config import AdversarialConfig, TrainingConfig
from robustfpd.data.noise import add_uniform_noise
from robustfpd.distributed import SINGLE_PROCESS, ProcessGroup
from robustfpd.models import FPD, Baseline
from robustfpd.models.mode import evaluating


class Perturb(Protocol):
    """Makes perturbed images of a batch."""

    def __call__(
        self, model: FPD | Baseline, clean: Tensor, labels: Tensor, epoch: float, draws: torch.Generator
    ) -> Tensor | None:
        """Perturb images N×C×H×W in [0, 1]; `epoch` counts finished epochs, 1.5 in the middle of the second."""


def noise(config: TrainingConfig, unit: Tensor | float = 1.0, group: ProcessGroup = SINGLE_PROCESS) -> Perturb:
    """Return x + unit · U(-noise, noise), the perturbation of two-phase training; `unit` is in pixels of [0, 1].

    `group` are the ranks that share each batch.
    """

    def perturb(
        model: FPD | Baseline, clean: Tensor, labels: Tensor, epoch: float, draws: torch.Generator
    ) -> Tensor:  # fmt: skip
        return add_uniform_noise(clean, config.noise, draws, unit, group)

    return perturb


def adversary(config: AdversarialConfig) -> Perturb:
    """Return the attack of adversarial training; it gives None before `start_epoch`.

    With `batch: halves` only the second half of the batch is attacked and returned.
    """

    def perturb(
        model: FPD | Baseline, clean: Tensor, labels: Tensor, epoch: float, draws: torch.Generator
    ) -> Tensor | None:
        since = epoch - config.start_epoch
        if since <= 0:
            return None
        eps = config.eps * (min(1.0, since / config.warmup) if config.warmup else 1.0)
        first = len(clean) // 2 if config.batch == "halves" else 0
        images, targets = clean[first:], labels[first:]
        classifier = attacked(model, config)
        with evaluating(model):
            if config.labels == "predicted":
                with torch.no_grad():
                    targets = classifier(images).argmax(dim=1)
            if config.attack == "fgsm":
                return fgsm(classifier, images, targets, eps=eps, norm=config.norm)
            return pgd(
                classifier, images, targets, eps=eps, norm=config.norm, steps=config.steps,
                step_size=config.step_size, generator=draws,
            )  # fmt: skip

    return perturb


def attacked(model: FPD | Baseline, config: AdversarialConfig) -> nn.Module:
    """What the attack differentiates: the classifier, or its logits before squashing where it has such."""
    views = adaptive.views(model.classifier())
    return views.get(config.view, views[adaptive.LOGITS])
