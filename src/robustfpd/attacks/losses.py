"""Losses that attacks maximize: logits N×K and labels N → N, larger where an attack is closer to success.

Logits in half precision are converted to float32: `EPSILON` is zero in float16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustfpd.attacks.half_precision import HALF
from robustfpd.errors import unknown_name

LossName = Literal["ce", "margin", "dlr"]
LossFunction = Callable[[Tensor, Tensor], Tensor]
Loss = LossName | LossFunction

EPSILON = 1e-12
"""Added to denominators."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy; its gradient vanishes in float32 where the logits are far apart."""
    return F.cross_entropy(_single(logits), labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return max_{k≠y} z_k - z_y: positive exactly where the image is misclassified."""
    logits = _single(logits)
    true = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    return others.amax(dim=1) - true


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the difference of logits ratio, margin / (z_π1 - z_π3) (Croce & Hein, ICML 2020, section 4).

    It is invariant to shifts and scales of the logits. With two classes, which have no third logit, it is the margin.
    """
    logits = _single(logits)
    if logits.shape[1] < 3:
        return margin(logits, labels)
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + EPSILON)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return the targeted DLR, (z_t - z_y) / (z_π1 - (z_π3 + z_π4)/2) (Croce & Hein, ICML 2020, section 5).

    `targets` are wrong classes, N. With three classes (z_π2 + z_π3)/2 is subtracted: with z_π3 alone the ratio would
    be constant where π3 is the target. With two classes it is the margin.
    """
    logits = _single(logits)
    true, target = (logits.gather(1, c.unsqueeze(1)).squeeze(1) for c in (labels, targets))
    if logits.shape[1] < 3:
        return target - true
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    subtracted = top[:, 1:] if logits.shape[1] == 3 else top[:, 2:]
    return (target - true) / (top[:, 0] - subtracted.mean(dim=1) + EPSILON)


_LOSSES: dict[str, LossFunction] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def loss_function(loss: Loss) -> LossFunction:
    """Return the loss of that name, or `loss` itself if it is a function."""
    if callable(loss):
        return loss
    if loss not in _LOSSES:
        raise unknown_name("loss", loss, _LOSSES)
    return _LOSSES[loss]


def _single(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in HALF else logits
