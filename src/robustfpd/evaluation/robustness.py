"""Robustness: the answer to "is the model robust?", separate from the verdict on the measurement."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from robustfpd.config import Config, Norm

Level = Literal["robust", "partly robust", "not robust", "unknown"]
NORM_NAMES = {"linf": "L∞", "l2": "L2", "l1": "L1"}
FEW, MOST = 1 / 4, 3 / 4  # survivors as a share of the correctly classified images
HALF = 1 / 2  # of all images
Z_SQUARED = 3.8415  # of the 95 % Wilson interval


class Published(Config):
    """A published robust accuracy under AutoAttack."""

    accuracy: float
    """Fraction of the test images."""
    source: str
    """Authors and year."""


PUBLISHED: dict[tuple[str, Norm, float], Published] = {
    ("mnist", "linf", 0.3): Published(accuracy=0.9634, source="Gowal et al., 2020"),
    ("cifar10", "linf", 8 / 255): Published(accuracy=0.7528, source="Amini et al., 2024"),
    ("cifar100", "linf", 8 / 255): Published(accuracy=0.4478, source="Amini et al., 2024"),
    ("imagenet", "linf", 4 / 255): Published(accuracy=0.6212, source="Amini et al., 2024"),
}
"""The best published robust accuracy known to this version, by data set, norm and radius.

Gowal et al., "Uncovering the Limits of Adversarial Training", 2020; Amini et al., "MeanSparse", 2024.
"""


class BaselineAccuracy(Config):
    """Robust accuracy of the undefended baseline on the same images, at the same radius."""

    name: str
    accuracy: float
    low: float
    high: float


class Robustness(Config):
    """Answer to "is the model robust?" at the largest radius of an evaluation. Accuracies are fractions."""

    level: Level
    """By the rule of `level`."""
    norm: Norm
    eps: float
    accuracy: float
    """Robust accuracy."""
    clean_accuracy: float
    guessing: float | None
    """Accuracy of guessing; None if the number of classes is unknown."""
    published: Published | None = None
    """The best published robust accuracy on this data set, norm and radius, if one is known."""
    baseline: BaselineAccuracy | None = None
    """Filled in by reports, which have the baseline's record."""

    def headline(self, reason: str | None) -> str:
        """Return both answers in sentences.

        Args:
            reason: why the measurement is not reliable; None if it is.
        """
        percent, place = f"{100 * self.accuracy:.1f} %", f"{NORM_NAMES[self.norm]} {format_eps(self.eps)}"
        if reason is not None:
            answer = "not robust. The" if self.level == "not robust" else "the"
            return (
                f"Robust accuracy at most {percent} at {place}: {answer} measurement is not reliable ({reason}). "
                "Do not rely on this number."
            )
        unknown = "no image was perturbed" if self.eps == 0 else "too few images for an answer"
        answer = unknown if self.level == "unknown" else self.level
        return f"Robust accuracy {percent} at {place}: {answer}. The measurement is reliable."


def level(
    *, robust: float, low: float, clean: float, images: int, eps: float, guessing: float | None, status: str
) -> Level:
    """Return how robust a model is; docs/checks.md explains the rule.

    It is `unknown` where the measurement is not reliable, the images are too few, or eps is 0.

    Args:
        robust: robust accuracy, a fraction of all images.
        low: low end of its 95 % interval.
        clean: clean accuracy.
        images: number of images.
        eps: radius.
        guessing: accuracy of guessing; None counts as 0.
        status: of the verdict. Adversarial examples also count in a `suspect` evaluation, survivors do not.
    """
    chance, share = guessing or 0.0, robust / clean if clean else 0.0
    if status == "broken" or eps == 0:
        return "unknown"
    if share < FEW:
        return "not robust"
    if images / (images + Z_SQUARED) <= chance:  # the low end if all images were robust
        return "unknown"
    if low <= chance:
        return "not robust"
    if status != "trusted":
        return "unknown"
    return "robust" if share >= MOST and low > HALF else "partly robust"


def guessing_accuracy(labels: Sequence[int], num_classes: int) -> float | None:
    """Return 1/K or the share of the most frequent label, whichever is larger; None without classes and labels.

    Args:
        labels: of the images.
        num_classes: number K of classes; 0 if unknown, then the largest label decides.
    """
    classes = max(num_classes, 1 + max(labels, default=-1))
    if classes == 0:
        return None
    majority = max(Counter(labels).values(), default=0) / max(len(labels), 1)
    return max(1 / classes, majority)


def best_published(dataset: str, norm: Norm, eps: float) -> Published | None:
    """Return the best published robust accuracy that is known."""
    known = (p for (d, n, e), p in PUBLISHED.items() if (d, n) == (dataset, norm) and math.isclose(e, eps))
    return next(known, None)


def format_eps(eps: float) -> str:
    """Return a radius as text: `0.1`, or `8/255`."""
    levels = eps * 255
    is_level = abs(levels - round(levels)) < 1e-6 and len(f"{eps:.6g}") > 5
    return f"{round(levels)}/255" if is_level else f"{eps:.4g}"
