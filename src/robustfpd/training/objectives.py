"""The losses of FPD training (Li et al., CVPR 2020)."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from robustfpd.config import TrainingConfig


class PassLosses(NamedTuple):
    """Losses of one pass through an FPD, each a scalar."""

    ce: Tensor
    """Cross-entropy of the logits."""
    restoration: Tensor
    """L2: mean squared difference between restored and clean image."""


def pass_losses(
    logits: Tensor, restored: Tensor, clean: Tensor, labels: Tensor, unit: Tensor | float = 1.0
) -> PassLosses:
    """Return both losses of a pass.

    Args:
        logits: N×K as the head gives them (the published head squashes them).
        restored: N×C×H×W.
        clean: N×C×H×W, the image without noise: always the target of the restoration.
        labels: N.
        unit: what one unit of the restoration loss is in pixels of [0, 1]; the model's std where the published code
            compares normalised images.
    """
    return PassLosses(F.cross_entropy(logits, labels), F.mse_loss(restored / unit, clean / unit))


def first_objective(losses: PassLosses, config: TrainingConfig) -> Tensor:
    """Phase 1 with the gate open: α₁·CE + α₂·L2."""
    return config.alpha_ce * losses.ce + config.alpha_restore * losses.restoration


def second_objective(losses: PassLosses, config: TrainingConfig) -> Tensor:
    """Phase 2: α₁·CE + α₂'·L2."""
    return config.alpha_ce * losses.ce + config.alpha_restore_second * losses.restoration
