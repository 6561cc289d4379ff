"""Closed forms of attacks on classifiers that are linear in the pixels, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

if TYPE_CHECKING:
    from tests.attacks.conftest import Linear


def best_gain(slope: Tensor, image: Tensor, eps: float, norm: str) -> float:
    """Return the largest slope·δ over ball ∩ box, for one image."""
    steep, x = slope.detach().double().abs().flatten().numpy(), image.double().flatten().numpy()
    room = np.where(slope.detach().flatten().numpy() > 0, 1 - x, x)
    if norm == "linf":
        return float(steep @ np.minimum(room, eps))
    if norm == "l1":
        order = np.argsort(-steep)
        before = np.cumsum(room[order]) - room[order]
        return float(steep[order] @ np.clip(eps - before, 0, room[order]))

    def step(t: float) -> Any:
        return np.minimum(t * steep, room)

    t = float((room / steep).max())
    if np.linalg.norm(step(t)) > eps:
        t = float(brentq(lambda t: np.linalg.norm(step(t)) - eps, 0, t, xtol=1e-14))
    return float(steep @ step(t))


def smallest_eps(classifier: Linear, images: Tensor, labels: Tensor, norm: str) -> Tensor:
    """Return the smallest eps that reaches the boundary between the classes 0 and 1, N, by bisection."""
    smallest, largest = [], {"linf": 1, "l2": 8, "l1": 64}[norm]
    for x, label, logits in zip(images, labels.tolist(), classifier(images).detach().double(), strict=True):
        slope = classifier.weight[1 - label] - classifier.weight[label]
        needed = float(logits[label] - logits[1 - label])
        smallest.append(brentq(lambda e, g=slope, x=x, n=needed: best_gain(g, x, e, norm) - n, 0, largest))
    return torch.tensor(smallest)


def margins(classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the largest wrong logit minus the true one, N."""
    with torch.no_grad():
        logits = classifier(images)
    true = logits.gather(1, labels[:, None])[:, 0]
    margin: Tensor = logits.scatter(1, labels[:, None], -torch.inf).amax(1) - true
    return margin
