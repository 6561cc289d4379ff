"""Class probabilities of images, and the change that the restoration makes to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustfpd.device import evaluating
from robustfpd.models.fpd import FPD, Baseline


@dataclass(frozen=True)
class Prediction:
    """Output of a network for N images; what only an FPD has is None for a baseline."""

    probabilities: Tensor
    """N×K, the softmax of the pre-squash logits. Those behind the published tanh lie in (-1, 1), where the softmax
    cannot exceed 45 % for ten classes."""
    restored: Tensor | None
    """N×C×H×W in [0, 1]."""
    change_rms: Tensor | None
    """N: root mean square of restored image minus image, in grey levels of 0 to 255."""
    change_mean: Tensor | None
    """N: mean absolute difference of restored image and image, likewise."""


@torch.no_grad()
def predict(model: FPD | Baseline, images: Tensor) -> Prediction:
    """Classify images N×C×H×W in [0, 1], in evaluation mode; an FPD restores them too."""
    with evaluating(model):
        if isinstance(model, Baseline):
            return Prediction(model(images).softmax(dim=1), None, None, None)
        restored = model.restore(images)
        logits = model.head.pre_squash(model.back(restored, images))
    restored = restored.clamp(0, 1)
    change = 255 * (restored - images).flatten(1)  # N C·H·W
    return Prediction(logits.softmax(dim=1), restored, change.square().mean(dim=1).sqrt(), change.abs().mean(dim=1))
