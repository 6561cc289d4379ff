"""What an evaluation is given: images, labels and a classifier that can be asked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.attacks.inputs import check_images, check_labels
from robustfpd.data import ImageSet
from robustfpd.errors import InputError, first_line
from robustfpd.seeding import generator

Data = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


def gather(data: Data, num_images: int | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and their places in `data`, checked; `num_images` drawn by the seed, in their own order."""
    if isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[0], (tuple, list)):
        images, labels = data
    elif isinstance(data, Iterable):
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
            raise InputError(f"batches of data do not fit together: {first_line(error)}") from None
    else:
        raise InputError(f"data must be (images, labels) or batches of such, found {type(data).__name__}")
    images = check_images(images).detach().cpu()
    labels = check_labels(labels, len(images)).cpu()
    if num_images is None or num_images >= len(images):
        return images, labels, torch.arange(len(images))
    if num_images < 1:
        raise InputError(f"num_images must be at least 1, found {num_images}")
    chosen = torch.randperm(len(images), generator=generator(seed, "images"))[:num_images].sort().values
    return images[chosen], labels[chosen], chosen


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
