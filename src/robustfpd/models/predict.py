"""What a network says about images, with probabilities that mean something."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robustfpd.models.fpd import FPD, Baseline
from robustfpd.models.mode import evaluating


@dataclass(frozen=True)
class Prediction:
    """What a network says about N images."""

    probabilities: Tensor
    """N×K, the softmax of the logits before any squashing. Those behind the published tanh lie in (-1, 1): their
    softmax cannot exceed 45 % for ten classes, however sure the network is."""
    restored: Tensor | None
    """N×C×H×W in [0, 1], of an FPD."""
    change_rms: Tensor | None
    """N: how far the restored image is from the image, root of the mean square, in grey levels of 0 to 255."""
    change_mean: Tensor | None
    """N: the same, mean of the absolute differences."""


@torch.no_grad()
def predict(model: FPD | Baseline, images: Tensor) -> Prediction:
    """Classify images N×C×H×W in [0, 1], in evaluation mode; an FPD also tells what it made of them."""
    with evaluating(model):
        if isinstance(model, Baseline):
            return Prediction(model(images).softmax(dim=1), None, None, None)
        restored = model.restore(images)
        logits = model.head.pre_squash(model.back(restored, images))
    restored = restored.clamp(0, 1)
    apart = 255 * (restored - images).flatten(1)
    return Prediction(
        logits.softmax(dim=1), restored, apart.square().mean(dim=1).sqrt(), apart.abs().mean(dim=1)
    )  # fmt: skip
