"""Losses that gradient attacks raise: logits N×K, labels N → N, larger where the attack is nearer its goal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustfpd.errors import unknown_name

LossName = Literal["ce", "margin", "dlr"]
LossFunction = Callable[[Tensor, Tensor], Tensor]
Loss = LossName | LossFunction

SMALL = 1e-12


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy; vanishes in float32 where logits are far apart."""
    return F.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest wrong logit minus the true one: positive exactly where the class is wrong."""
    true = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    return others.amax(dim=1) - true


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce & Hein, ICML 2020, section 4): the margin over (largest - third logit).

    Neither shifting nor scaling the logits changes it. Two classes have no third logit: the margin then.
    """
    if logits.shape[1] < 3:
        return margin(logits, labels)
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + SMALL)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """DLR towards `targets`, N wrong classes (Croce & Hein, ICML 2020, section 5).

    Three classes have no fourth logit: the mean of the second and the third stands below then, because with the third
    alone the ratio would be constant where that is the target. Two classes: the margin.
    """
    true, target = (logits.gather(1, c.unsqueeze(1)).squeeze(1) for c in (labels, targets))
    if logits.shape[1] < 3:
        return target - true
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    below = top[:, 1:] if logits.shape[1] == 3 else top[:, 2:]
    return (target - true) / (top[:, 0] - below.mean(dim=1) + SMALL)


_LOSSES: dict[str, LossFunction] = {"ce": cross_entropy, "margin": margin, "dlr": dlr}


def loss_function(loss: Loss) -> LossFunction:
    """Return a loss by name; a function is one already; an unknown name is an InputError."""
    if callable(loss):
        return loss
    if loss not in _LOSSES:
        raise unknown_name("loss", loss, _LOSSES)
    return _LOSSES[loss]
