"""Attacks in normalised space, as the published CALTECH evaluation ran them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from robustfpd.data import ImageSet
from robustfpd.errors import InputError
from robustfpd.models import FPD, Baseline, FPDClassifier


class NormalisedInput(nn.Module):
    """A classifier of normalised images: undoes mean and std before it."""

    def __init__(self, classifier: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, normalised: Tensor) -> Tensor:
        """Classify normalised images N×C×H×W: logits N×K."""
        logits: Tensor = self.classifier(normalised * self.std + self.mean)
        return logits


def in_space(
    classifier: nn.Module, images: ImageSet, space: Literal["pixels", "normalised"]
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return classifier and (images, labels) as an evaluation in `space` attacks them.

    In `normalised` space images are (x - mean) / std, cut to [0, 1] as the published attacks cut them: what is darker
    than the mean becomes the mean, and eps 8/255 is 8/255 · std in pixels. Attacks see the logits only.

    Raises:
        InputError: normalised space for a classifier that is not ours, so that mean and std are unknown.
    """
    pixels, labels = images.floats()
    if space == "pixels":
        return classifier, (pixels, labels)
    owner = classifier.fpd if isinstance(classifier, FPDClassifier) else classifier
    if not isinstance(owner, (FPD, Baseline)):
        raise InputError(
            "evaluation.space=normalised needs a robustfpd model, which knows mean and std; "
            f"found {type(classifier).__name__}"
        )
    normalised = (pixels - owner.mean.cpu()) / owner.std.cpu()
    return NormalisedInput(classifier, owner.mean, owner.std), (normalised.clamp(0, 1), labels)
