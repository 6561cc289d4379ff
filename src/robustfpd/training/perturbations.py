"""Adversarial images for training; `data.transforms.add_uniform_noise` adds the noise of two-phase training."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustfpd.attacks import adaptive, fgsm, pgd
from robustfpd.config import AdversarialConfig
from robustfpd.device import evaluating
from robustfpd.models import FPD, Baseline


def adversarial_images(
    model: FPD | Baseline, clean: Tensor, labels: Tensor, config: AdversarialConfig, epoch: float = math.inf,
    generator: torch.Generator | None = None,
) -> Tensor | None:  # fmt: skip
    """Attack a training batch with the model in evaluation mode.

    Args:
        model: the model that is trained; its modes, weights, gradients and statistics stay the same.
        clean: N×C×H×W in [0, 1].
        labels: N class indices.
        config: attack, `eps`, `norm`, `steps`, `step_size`, `view`, `labels`, `batch`, `start_epoch` and `warmup`.
        epoch: count of finished epochs, 1.5 in the middle of the second: eps grows from 0 at `start_epoch` over
            `warmup` epochs. The default attacks at the full eps.
        generator: source of PGD's random starts.

    Returns:
        Adversarial images in [0, 1]: N×C×H×W, or those of the second half of the batch with `batch: halves`. None up to
        `start_epoch`.
    """
    since_start = epoch - config.start_epoch
    if since_start <= 0:
        return None
    eps = config.eps * (min(1.0, since_start / config.warmup) if config.warmup else 1.0)
    first = len(clean) // 2 if config.batch == "halves" else 0
    images, targets = clean[first:], labels[first:]
    classifier = attacked_view(model, config)
    with evaluating(model):
        if config.labels == "predicted":
            with torch.no_grad():
                targets = classifier(images).argmax(dim=1)
        if config.attack == "fgsm":
            return fgsm(classifier, images, targets, eps=eps, norm=config.norm)
        return pgd(
            classifier, images, targets, eps=eps, norm=config.norm, steps=config.steps, step_size=config.step_size,
            generator=generator,
        )  # fmt: skip


def attacked_view(model: FPD | Baseline, config: AdversarialConfig) -> nn.Module:
    """Return the module that attacks differentiate: `config.view`, or the logits where the model has no such view."""
    views = adaptive.views(model.classifier())
    return views.get(config.view, views[adaptive.LOGITS])
