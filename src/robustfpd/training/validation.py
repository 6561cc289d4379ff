"""How good a network is on validation images between epochs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.attacks import pgd
from robustfpd.config import AdversarialConfig
from robustfpd.data import ImageSet
from robustfpd.data.batches import batches
from robustfpd.distributed import ProcessGroup
from robustfpd.models import FPD, Baseline, FPDOutput
from robustfpd.models.mode import evaluating
from robustfpd.rng import generator
from robustfpd.training.perturbations import attacked

PGD_STEPS = 10


@dataclass(frozen=True)
class Validation:
    """Accuracy, cross-entropy and restoration loss on clean images, and accuracy under PGD where it was asked for."""

    accuracy: float
    ce: float
    restoration: float | None
    robust_accuracy: float | None = None

    @property
    def loss(self) -> float:
        """Cross-entropy plus restoration loss, what the published schedule follows."""
        return self.ce + (self.restoration or 0.0)


@torch.no_grad()
def validate(
    model: nn.Module, images: ImageSet, batch_size: int, device: torch.device, unit: Tensor | float = 1.0
) -> Validation:
    """Measure a model on clean images, sharded over the ranks; `unit` is that of the restoration loss."""
    right, ce, restoration, restores, count = 0, 0.0, 0.0, False, len(images)
    group = ProcessGroup.current()
    mine = images.take(torch.arange(count)[group.shard(count)])
    with evaluating(model):
        for clean, labels in batches(mine, batch_size, device) if len(mine) else ():
            out = model(clean)
            logits: Tensor = out.logits if isinstance(out, FPDOutput) else out
            right += int((logits.argmax(dim=1) == labels).sum())
            ce += float(F.cross_entropy(logits, labels, reduction="sum"))
            if isinstance(out, FPDOutput):
                restores = True
                restoration += float(F.mse_loss(out.restored / unit, clean / unit)) * len(clean)
    values = group.gather((right, ce, restoration, restores))
    right, ce, restoration, restores = (sum(column) for column in zip(*values, strict=True))
    return Validation(right / count, ce / count, restoration / count if restores else None)


def robust_accuracy(
    model: FPD | Baseline, images: ImageSet, config: AdversarialConfig, batch_size: int, device: torch.device, seed: int
) -> float:
    """Accuracy under PGD-10 at `config.eps` on `config.select_images` images drawn by `seed`.

    Adversarial images are classified by the model itself, whatever view was attacked (Rice et al., ICML 2020, on why
    the epoch must be picked by robust accuracy). Several ranks shard the images, and each draws its own starts.
    """
    group = ProcessGroup.current()
    chosen = torch.randperm(len(images), generator=generator(seed, "select"))[: config.select_images]
    chosen = chosen.sort().values
    mine = images.take(chosen[group.shard(len(chosen))])
    draws = generator(seed, "select-attack", *group.seed_purpose)
    classifier, right = model.classifier(), 0
    with evaluating(model):
        for clean, labels in batches(mine, batch_size, device) if len(mine) else ():
            found = pgd(
                attacked(model, config), clean, labels, eps=config.eps, norm=config.norm, steps=PGD_STEPS,
                generator=draws,
            )  # fmt: skip
            with torch.no_grad():
                kept = (classifier(clean).argmax(dim=1) == labels) & (classifier(found).argmax(dim=1) == labels)
            right += int(kept.sum())
    return sum(group.gather(right)) / len(chosen)
