"""What an evaluation is given: images, labels and a classifier that can be asked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.attacks.base import reproducible
from robustfpd.attacks.inputs import check_images, check_labels
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Norm, check_eps
from robustfpd.data import ImageSet
from robustfpd.errors import InputError, first_line
from robustfpd.models.mode import evaluating
from robustfpd.rng import generator

Data = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


def concatenate(data: Any) -> tuple[Any, Any]:
    """Return the images and labels of (images, labels) or of a loader of such batches, as they are."""
    if isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[0], (tuple, list)):
        return data[0], data[1]
    if isinstance(data, Iterable):
        batches = list(data)
        if not batches:
            raise InputError("data must hold at least one image, found none")
        odd = [b for b in batches if not isinstance(b, (tuple, list)) or len(b) != 2]
        if odd or not all(isinstance(t, Tensor) for b in batches for t in b):
            found = type((odd or batches)[0]).__name__
            raise InputError(f"data must be (images, labels) or batches of such, as tensors; found batches of {found}")
        try:
            images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        except RuntimeError as error:
            raise InputError(f"batches of data have different shapes: {first_line(error)}") from None
        return images, labels
    raise InputError(f"data must be (images, labels) or batches of such, found {type(data).__name__}")


def gather(data: Data, num_images: int | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return checked images and labels and their indices in `data`; `num_images` drawn by the seed, in order."""
    images, labels = concatenate(data)
    images = check_images(images).detach().cpu()
    labels = check_labels(labels, len(images)).cpu()
    if num_images is not None:
        check_count("num_images", num_images)
    if num_images is None or num_images >= len(images):
        return images, labels, torch.arange(len(images))
    chosen = torch.randperm(len(images), generator=generator(seed, "images"))[:num_images].sort().values
    return images[chosen], labels[chosen], chosen


def look(classifier: nn.Module, images: Tensor, device: torch.device) -> tuple[str, int]:
    """What identifies a classifier beside its weights, and its number of classes; "" and 0 where it cannot be asked.

    Its kind and its answers to the first images: code and plain attributes are no weights.

    Raises:
        InputError: its weights are not real, or it changes the images that it is given.
    """
    if device.type == "meta" or any(isinstance(p, nn.UninitializedParameter) for p in classifier.parameters()):
        raise InputError("the classifier's weights hold no values yet (meta device, lazy modules); load them first")
    x = images[:4].to(device, copy=True)
    before = x.clone()
    try:
        with evaluating(classifier), reproducible(torch.Generator().manual_seed(0)), torch.no_grad():
            logits = classifier(x)
    except Exception:  # told by name when the images are classified
        return "", 0
    if not torch.equal(x, before):
        raise InputError(
            "the classifier changes its input in place, so attacks lose their images; let it work on a copy"
        )
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.is_complex() or logits.layout != torch.strided:
        return "", 0
    said = " ".join(f"{value:.3e}" for value in logits.float().flatten().tolist())
    kind = f"{type(classifier).__module__}.{type(classifier).__qualname__}"
    return hashlib.sha256(f"{kind} {said}".encode()).hexdigest(), logits.shape[1]


def checked_radii(eps: float | Sequence[float], norm: Norm) -> list[float]:
    """Radii, checked, smallest first."""
    if isinstance(eps, str):
        raise InputError(f"eps must be a number or several, found the text {eps!r}")
    lp_ball(norm)
    several = eps if isinstance(eps, Iterable) and getattr(eps, "ndim", None) != 0 else [eps]
    radii = sorted({check_eps(e, norm) for e in several})
    if not radii:
        raise InputError("eps must hold at least one radius, found none")
    return radii


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """Refuse what is no whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        whole = "" if isinstance(value, int) else "a whole number, "
        raise InputError(f"{name} must be {whole}at least {least}, found {value!r}")


def check_module(classifier: Any, name: str = "classifier") -> nn.Module:
    """Return a classifier if it is a module."""
    if not isinstance(classifier, nn.Module):
        raise InputError(f"{name} must be a torch.nn.Module, found {type(classifier).__name__}")
    return classifier


def digest(images: Tensor, labels: Tensor) -> str:
    """SHA-256 of the images as 8-bit pixels, and the labels."""
    return ImageSet((images * 255).round().to(torch.uint8), labels).digest()


def exact_digest(images: Tensor, labels: Tensor) -> str:
    """SHA-256 of every bit of the images, and the labels."""
    found = hashlib.sha256(repr((images.dtype, tuple(images.shape))).encode())
    for values in (images, labels):
        found.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def device_of(classifier: nn.Module, images: Tensor) -> torch.device:
    """Where the classifier's weights lie; where the images do if it has none."""
    tensors = [*classifier.parameters(), *classifier.buffers()]
    return tensors[0].device if tensors else images.device
