"""Objectives of adversarial training: losses of the logits on clean images x and adversarial images x'.

Every objective takes logits N×K and returns a scalar. p(x) are the softmax probabilities of the logits at x, y the
labels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from robustfpd.config import Objective

EPSILON = 1e-12
"""Added to the arguments of logarithms."""


def madry(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """Return CE(x', y), the outer loss of min-max training (Madry et al., ICLR 2018, equation 2.1).

    `clean` and `beta` are unused.
    """
    return F.cross_entropy(adversarial, labels, label_smoothing=smoothing)


def trades(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """Return CE(x, y) + β KL(p(x) ‖ p(x')) (Zhang et al., ICML 2019, equation 5; `beta` is their 1/λ)."""
    return F.cross_entropy(clean, labels, label_smoothing=smoothing) + beta * divergence(clean, adversarial).mean()


def mart(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """Return BCE(x', y) + λ KL(p(x) ‖ p(x')) (1 - p_y(x)) (Wang et al., ICLR 2020, equation 11; `beta` is their λ).

    BCE(x', y) = CE(x', y) - log(1 - max_{k≠y} p_k(x')) (their equation 8).
    """
    probabilities = adversarial.softmax(dim=1)
    wrong = probabilities.scatter(1, labels[:, None], 0.0).amax(dim=1)
    boosted = F.cross_entropy(adversarial, labels, label_smoothing=smoothing) - (1 - wrong + EPSILON).log().mean()
    true = clean.softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
    return boosted + beta * (divergence(clean, adversarial) * (1 - true)).mean()


def divergence(clean: Tensor, adversarial: Tensor) -> Tensor:
    """Return KL(p(x) ‖ p(x')) for each of N images."""
    return F.kl_div(adversarial.log_softmax(dim=1), clean.log_softmax(dim=1), reduction="none", log_target=True).sum(1)


OBJECTIVES: dict[Objective, Callable[..., Tensor]] = {"madry": madry, "trades": trades, "mart": mart}
"""Objectives by the names of `adversarial.objective`, without `mixed`, the mean cross-entropy of both passes."""
