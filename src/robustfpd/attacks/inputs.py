"""What an attack or an evaluation refuses before it starts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.errors import InputError


def check_images(images: Any, name: str = "images") -> Tensor:
    """Return `images` if they are N×C×H×W, floating point, in [0, 1]; else an InputError naming what was found."""
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
    """Return `labels` if they are `count` non-negative integers."""
    if not isinstance(labels, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, found {type(labels).__name__}")
    if labels.shape != (count,):
        raise InputError(f"{name} must have shape ({count},), one per image, found {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"{name} must be integers, found {labels.dtype}")
    if int(labels.min()) < 0:
        raise InputError(f"{name} must not be negative, found {int(labels.min())}")
    return labels.long()


def check_shape(logits: Any, labels: Tensor) -> Tensor:
    """Return a classifier's output if it is N×K."""
    if not isinstance(logits, Tensor):
        hint = "; attack model.classifier()" if hasattr(logits, "logits") else ""
        raise InputError(f"classifier must return logits N×K, found {type(logits).__name__}{hint}")
    if logits.ndim != 2 or len(logits) != len(labels):
        raise InputError(f"classifier must return logits N×K with N={len(labels)}, found {tuple(logits.shape)}")
    if logits.is_complex() or logits.layout != torch.strided:
        raise InputError(f"classifier must return real, dense logits, found {logits.dtype}, {logits.layout}")
    found: Tensor = logits
    return found


def check_logits(logits: Any, labels: Tensor) -> Tensor:
    """Return a classifier's output if it is N×K, finite, and K covers the labels."""
    found = check_shape(logits, labels)
    if not bool(found.isfinite().all()):
        raise InputError("classifier returned NaN or infinite logits")
    if int(labels.max()) >= found.shape[1]:
        raise InputError(f"labels must be below the classifier's {found.shape[1]} classes, found {int(labels.max())}")
    return found


def check_eps(eps: Any, norm: str, name: str = "eps") -> float:
    """Return `eps` if it is a positive radius, at most 1 in L∞."""
    if getattr(eps, "ndim", None) == 0:  # numbers of torch and numpy
        eps = eps.item()
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not math.isfinite(eps) or eps <= 0:
        raise InputError(f"{name} must be a positive number, found {eps!r}")
    if norm == "linf" and eps > 1:
        raise InputError(
            f"{name} must be at most 1 in linf (pixels lie in [0, 1]), found {eps}; 8/255 is eight grey levels"
        )
    return float(eps)


def num_classes(classifier: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Return K, found by one forward pass of the first image; what `check_logits` refuses, and K = 1, are refused."""
    with torch.no_grad():
        logits = check_logits(classifier(images[:1]), labels[:1])
    check_logits(logits.expand(len(labels), -1), labels)
    if logits.shape[1] < 2:
        raise InputError("classifier must tell at least two classes apart, found one")
    return int(logits.shape[1])


def check_batch_size(batch_size: Any) -> None:
    """Refuse what is neither None nor a number of images."""
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"batch_size must be None or a whole number of at least 1, found {batch_size!r}")


def positive(**options: float) -> None:
    """Refuse options that are not positive numbers."""
    for name, value in options.items():
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} must be a positive number, found {value!r}")
