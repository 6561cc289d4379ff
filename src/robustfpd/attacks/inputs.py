"""Checks of what a user passes to an attack or an evaluation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.errors import InputError


def check_images(images: Any, name: str = "images") -> Tensor:
    """Return `images` if they are an N×C×H×W floating-point tensor in [0, 1]; raise an InputError otherwise."""
    if not isinstance(images, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, found {type(images).__name__}")
    if images.ndim != 4 or images.numel() == 0:
        raise InputError(f"{name} must be N×C×H×W with at least one image, found shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise InputError(f"{name} must be floating point in [0, 1], found {images.dtype}; divide uint8 by 255")
    if not bool(images.isfinite().all()):
        raise InputError(f"{name} must be finite, found {int((~images.isfinite()).sum())} NaN or infinite pixels")
    low, high = (float(bound) for bound in images.detach().aminmax())
    if low < 0 or high > 1:
        hint = "divide by 255" if low >= 0 and high > 2 else "normalise inside the model, not in the data"
        raise InputError(f"{name} must lie in [0, 1], found [{low:.4g}, {high:.4g}]; {hint}")
    return images


def check_labels(labels: Any, count: int, name: str = "labels") -> Tensor:
    """Return `labels` as int64 if they are `count` non-negative integers; raise an InputError otherwise."""
    if not isinstance(labels, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, found {type(labels).__name__}")
    if labels.shape != (count,):
        raise InputError(f"{name} must have shape ({count},), one per image, found {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"{name} must be integers, found {labels.dtype}")
    if int(labels.min()) < 0:
        raise InputError(f"{name} must not be negative, found {int(labels.min())}")
    return labels.long()


def check_shape(output: Any, labels: Tensor) -> Tensor:
    """Return a classifier's output if it is a dense, real N×K tensor; raise an InputError otherwise."""
    if not isinstance(output, Tensor):
        hint = "; attack model.classifier()" if hasattr(output, "logits") else ""
        raise InputError(f"classifier must return logits N×K, found {type(output).__name__}{hint}")
    if output.ndim != 2 or len(output) != len(labels):
        raise InputError(f"classifier must return logits N×K with N={len(labels)}, found {tuple(output.shape)}")
    if output.is_complex() or output.layout != torch.strided:
        raise InputError(f"classifier must return real, dense logits, found {output.dtype}, {output.layout}")
    logits: Tensor = output
    return logits


def check_logits(output: Any, labels: Tensor) -> Tensor:
    """Return a classifier's output if it is N×K, finite, and K exceeds all labels; raise an InputError otherwise."""
    logits = check_shape(output, labels)
    if not bool(logits.isfinite().all()):
        raise InputError("classifier returned NaN or infinite logits")
    if int(labels.max()) >= logits.shape[1]:
        raise InputError(f"labels must be below the classifier's {logits.shape[1]} classes, found {int(labels.max())}")
    return logits


def check_differentiable(value: Tensor) -> None:
    """Raise an InputError if `value`, computed from images that require gradients, has no gradient."""
    if not value.requires_grad:
        raise InputError("the classifier's logits do not depend differentiably on the images; use a black-box attack")


def num_classes(classifier: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return K, from one forward pass of the first image.

    Raises:
        InputError: the output fails `check_logits`, or K = 1.
    """
    with torch.no_grad():
        logits = check_logits(classifier(images[:1]), labels[:1])
    check_logits(logits.expand(len(labels), -1), labels)
    if logits.shape[1] < 2:
        raise InputError("classifier must have at least two classes, found one")
    return int(logits.shape[1])


def check_batch_size(batch_size: Any) -> None:
    """Raise an InputError unless `batch_size` is None or a positive integer."""
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"batch_size must be None or a whole number of at least 1, found {batch_size!r}")


def check_counts(**counts: int) -> None:
    """Raise an InputError if an option is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} must be at least 1, found {count}")


def check_positive(**options: float) -> None:
    """Raise an InputError if an option is not a positive, finite number."""
    for name, value in options.items():
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} must be a positive number, found {value!r}")
