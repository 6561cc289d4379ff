"""Accuracy and losses on the validation images after each epoch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.attacks import pgd
from robustfpd.config import AdversarialConfig
from robustfpd.data import ImageSet
from robustfpd.data.image_set import batches
from robustfpd.distributed import ProcessGroup
from robustfpd.models import FPD, Baseline, FPDOutput
from robustfpd.models.mode import evaluating
from robustfpd.rng import generator
from robustfpd.training.perturbations import attacked_view

PGD_STEPS = 10


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

    The attack differentiates `config.view`; the model's own logits decide whether its image is adversarial. Rice et
    al., ICML 2020, show why robust accuracy has to select the epoch. Images are sharded over the ranks, and each rank
    draws its own random starts.
    """
    group = ProcessGroup.current()
    selected = torch.randperm(len(images), generator=generator(seed, "select"))[: config.select_images]
    selected = selected.sort().values
    shard = images.take(selected[group.shard(len(selected))])
    draws = generator(seed, "select-attack", *group.seed_purpose)
    classifier, robust = model.classifier(), 0
    with evaluating(model):
        for clean, labels in batches(shard, batch_size, device) if len(shard) else ():
            adversarial = pgd(
                attacked_view(model, config), clean, labels, eps=config.eps, norm=config.norm, steps=PGD_STEPS,
                generator=draws,
            )  # fmt: skip
            with torch.no_grad():
                predictions = [classifier(x).argmax(dim=1) for x in (clean, adversarial)]
            robust += int(((predictions[0] == labels) & (predictions[1] == labels)).sum())
    return sum(group.gather(robust)) / len(selected)
