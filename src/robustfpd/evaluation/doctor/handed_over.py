"""What is wrong with images and labels before any classifier sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.attacks.inputs import check_labels
from robustfpd.errors import InputError, first_line
from robustfpd.evaluation.checks.inputs import ONE_LEVEL, images_in_range
from robustfpd.evaluation.doctor.finding import Finding, found, told

IMAGES, LABELS = "images-in-range", "labels"
ONE_EACH = "give one integer per image, from 0 to K-1"
OVERSHOOT = 0.25
"""How far resizing with bicubic or Lanczos filters leads out of [0, 1], at most."""


class Affine(nn.Module):
    """A classifier of images that were mapped into [0, 1]: maps them back before it."""

    def __init__(self, classifier: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.classifier = classifier
        self.low, self.high = low, high

    def forward(self, images: Tensor) -> Tensor:
        """Classify images."""
        logits: Tensor = self.classifier(self.low + (self.high - self.low) * images)
        return logits


def together(data: Any) -> tuple[Tensor, Any]:
    """Images and labels of (images, labels) or of a loader, whatever they hold."""
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor):
        images, labels = data
    elif isinstance(data, Iterable):
        pairs = [batch for batch in data if isinstance(batch, (tuple, list)) and len(batch) == 2]
        if not pairs or not all(isinstance(part, Tensor) for pair in pairs for part in pair):
            raise InputError("data must be (images, labels) or batches of such, as tensors")
        try:
            images, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        except RuntimeError as error:
            raise InputError(f"batches of data do not fit together: {first_line(error)}") from None
    else:
        raise InputError(f"data must be (images, labels) or batches of such, found {type(data).__name__}")
    if images.ndim != 4 or images.numel() == 0:
        raise InputError(f"images must be N×C×H×W with at least one image, found shape {tuple(images.shape)}")
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().reshape(labels.shape or (1,))  # a number alone has no length to compare
    return images.detach().cpu(), labels


def look_at_images(images: Tensor, classifier: nn.Module) -> tuple[Finding, Tensor, nn.Module]:
    """What is wrong with the images; the images mended, and the classifier that takes them so.

    Images that are outside [0, 1] because they are normalised reach the classifier as they were given.
    """
    said, low, high = f"{images.dtype} {tuple(images.shape[1:])}", float(images.amin()), float(images.amax())
    said = f"{said}, pixels in [{low:.4g}, {high:.4g}]"
    if images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        fix = "put channels first: images = images.permute(0, 3, 1, 2)"
        _, mended, classifier = look_at_images(images.permute(0, 3, 1, 2), classifier)
        return found(IMAGES, True, f"{said}: channels come last", fix), mended, classifier
    if not images.is_floating_point():
        scale = 255 if high > 1 else 1
        fix = f"make them floats in [0, 1]: images = images.float() / {scale}"
        return found(IMAGES, True, f"{said}: integers", fix), images.float() / scale, classifier
    bad = int((~images.isfinite()).flatten(1).any(dim=1).sum())
    if bad:
        fix = "find out where they come from (a division by a zero std?), or drop them: images[images.isfinite()...]"
        whole = images.nan_to_num(0, 1, 0).clamp(0, 1)
        return found(IMAGES, True, f"NaN or infinite pixels in {bad} of {len(images)} images", fix), whole, classifier
    if low >= 0 and high <= 1:
        fix = "divide by 255 once; torchvision's ToTensor has done it already"
        twice = 0 < high <= 1.001 * ONE_LEVEL
        return told(images_in_range(images), fix), (255 * images).clamp(0, 1) if twice else images, classifier
    if low >= 0 and high > 2:
        fix = "divide by 255: images = images.float() / 255"
        return found(IMAGES, True, f"{said}: grey levels", fix), (images / 255).clamp(0, 1), classifier
    if low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
        fix = "cut off what resizing leaves outside: images = images.clamp(0, 1)"
        return found(IMAGES, True, f"{said}: a little outside [0, 1]", fix), images.clamp(0, 1), classifier
    fix = (
        "hand over images in [0, 1] and normalise inside the model: "
        "nn.Sequential(torchvision.transforms.Normalize(mean, std), model)"
    )
    wrapped = Affine(classifier, low, high)
    wrapped.training = classifier.training
    scaled = (images - low) / (high - low)
    return found(IMAGES, True, f"{said}: normalised, so eps is in no known unit", fix), scaled, wrapped


def look_at_labels(labels: Any, count: int, classes: int) -> tuple[Finding, Tensor | None]:
    """What is wrong with the labels, and the labels mended; None where they cannot be.

    Args:
        labels: as they were given.
        count: how many images there are.
        classes: how many classes there are, as far as is known.
    """
    if not isinstance(labels, Tensor):
        return _labels([(f"labels must be a torch.Tensor, found {type(labels).__name__}", ONE_EACH)]), None
    mended, wrong = _integers(labels, count)
    try:
        checked = check_labels(mended, count)
    except InputError as error:
        return _labels([*wrong, (str(error), ONE_EACH)]), None
    low, high = int(checked.min()), int(checked.max())
    if high == classes and low >= 1:
        evidence = f"labels run from {low} to {high}, but classes from 0 to {classes - 1}"
        return _labels([*wrong, (evidence, "count classes from 0: labels = labels - 1")]), checked - 1
    if high >= classes:
        evidence = f"labels run up to {high}, but there are {classes} classes"
        return _labels([*wrong, (evidence, "take the data set that the model was trained for")]), None
    if wrong:
        return _labels(wrong), checked
    return found(
        LABELS, False, f"{len(set(checked.tolist()))} classes among {count} labels, {low} to {high}", ""
    ), checked


def _integers(labels: Tensor, count: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """Labels in the form of one integer each as far as that can be had, and what was in the way: evidence and fix."""
    wrong = []
    if labels.ndim == 2 and labels.shape[1] == 1:
        wrong.append((f"shape {tuple(labels.shape)}", "labels = labels.squeeze(1)"))
        labels = labels[:, 0]
    if labels.ndim == 2 and len(labels) == count and labels.shape[1] > 1:
        fix = "give the number of the class: labels = labels.argmax(dim=1)"
        wrong.append((f"shape {tuple(labels.shape)}: one row per image", fix))
        labels = labels.int().argmax(dim=1) if labels.dtype == torch.bool else labels.argmax(dim=1)
    if labels.is_floating_point() and bool((labels.isfinite() & (labels == labels.round())).all()):
        wrong.append((f"labels are {labels.dtype}", "make them integers: labels = labels.long()"))
        labels = labels.long()
    return labels, wrong


def _labels(wrong: Sequence[tuple[str, str]]) -> Finding:
    """All that is wrong with the labels in one finding."""
    return found(LABELS, True, "; ".join(told for told, _ in wrong), "; then ".join(fix for _, fix in wrong))
