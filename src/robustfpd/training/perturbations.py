"""Perturbed images for training: noisy ones for two-phase training, and adversarial ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustfpd.attacks import adaptive, pgd
from robustfpd.attacks.losses import LossFunction, cross_entropy
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import AdversarialConfig, TrainingConfig
from robustfpd.data.transforms import add_uniform_noise
from robustfpd.device import evaluating
from robustfpd.distributed import SINGLE_PROCESS, ProcessGroup
from robustfpd.models import FPD, Baseline
from robustfpd.training.objectives import divergence
from robustfpd.training.steps import noise_unit

FGSM_RS_STEP = 1.25
"""Step of `fgsm-rs` in units of eps (Wong et al., ICLR 2020, section 5)."""


def noisy_images(
    model: nn.Module, clean: Tensor, config: TrainingConfig, generator: torch.Generator,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Tensor:  # fmt: skip
    """Return a training batch with the noise of two-phase training, not clipped.

    Args:
        model: an FPD or a baseline; `space: normalised` multiplies the noise by the model's std.
        clean: N×C×H×W in [0, 1].
        config: `noise` and `space`.
        generator: source of the noise.
        group: the ranks that share the batch, of which `clean` is this rank's part.
    """
    return add_uniform_noise(clean, config.noise, generator, noise_unit(model, config), group)


def adversarial_images(
    model: FPD | Baseline, clean: Tensor, labels: Tensor, config: AdversarialConfig, epoch: float = math.inf,
    generator: torch.Generator | None = None,
) -> Tensor | None:  # fmt: skip
    """Attack a training batch with the model in evaluation mode.

    PGD and FGSM return the iterate with the largest loss, FGSM with a random start (Wong et al., ICLR 2020) the point
    after its step.

    Args:
        model: the model that is trained; its modes, weights, gradients and statistics stay the same.
        clean: N×C×H×W in [0, 1].
        labels: N class indices.
        config: `objective`, attack, `eps`, `norm`, `steps`, `step_size`, `view`, `labels`, `batch`, `start_epoch` and
            `warmup`. The attack of `trades` maximizes the divergence from the clean images' probabilities, the others
            the cross-entropy.
        epoch: count of finished epochs, 1.5 in the middle of the second: eps grows from 0 at `start_epoch` over
            `warmup` epochs. The default attacks at the full eps.
        generator: source of random starts.

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
    loss: LossFunction = cross_entropy
    with evaluating(model):
        if config.objective == "trades" or config.labels == "predicted":
            with torch.no_grad():
                logits = classifier(images)
            targets = logits.argmax(dim=1)
            if config.objective == "trades":
                loss = lambda adversarial, labels: divergence(logits, adversarial)  # noqa: E731
        if config.attack == "fgsm-rs":
            ball = lp_ball(config.norm)
            draws = torch.Generator(images.device).manual_seed(0) if generator is None else generator
            x = (images + ball.sample(images, eps, draws)).clamp(0, 1).requires_grad_()
            (gradient,) = torch.autograd.grad(loss(classifier(x), targets).sum(), x)
            with torch.no_grad():
                ball.step(x, gradient, config.step_size or FGSM_RS_STEP * eps, images, eps)
            return x.detach()
        steps, step_size = (config.steps, config.step_size) if config.attack == "pgd" else (1, config.step_size or eps)
        return pgd(
            classifier, images, targets, eps=eps, norm=config.norm, steps=steps, step_size=step_size,
            random_start=config.attack == "pgd", loss=loss, generator=generator,
        )  # fmt: skip


def attacked_view(model: FPD | Baseline, config: AdversarialConfig) -> nn.Module:
    """Return the module that attacks differentiate: `config.view`, or the logits where the model has no such view."""
    views = adaptive.views(model.classifier())
    return views.get(config.view, views[adaptive.LOGITS])
