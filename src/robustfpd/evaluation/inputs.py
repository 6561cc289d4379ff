"""Check the inputs of an evaluation (images, labels, radii, classifier), and choose its batch sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustfpd.attacks.base import check_images, check_labels, reproducible
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Norm, check_eps
from robustfpd.data import ImageSet
from robustfpd.device import evaluating
from robustfpd.errors import InputError
from robustfpd.evaluation.loaders import draw_images, read
from robustfpd.models import FPD, Baseline, FPDClassifier

Data = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]

SMALLEST_BLOCK, LARGEST_BLOCK = 64, 256
MIN_BLOCKS = 4  # also for few images, so that four ranks can share them
DIGEST_BATCH = 64
CPU_BATCH_SIZE = 64  # larger batches are no faster on a CPU
CPU_BATCH_VALUES = 1 << 20  # pixel values per batch on a CPU; a network's features take hundreds of times as much


@dataclass(frozen=True)
class EvaluationData:
    """Images to attack and their labels, on the CPU."""

    images: Tensor
    """N×C×H×W in [0, 1]."""
    labels: Tensor
    """N."""
    ids: Tensor
    """Index of each image in the data given, N; the ledger's column `image`."""

    @cached_property
    def positions(self) -> dict[int, int]:
        """Position in `images` by id."""
        return {int(image): position for position, image in enumerate(self.ids)}

    def float(self) -> EvaluationData:
        """Return the same with images in float32."""
        return EvaluationData(self.images.float(), self.labels, self.ids)

    def digest(self) -> str:
        """Return the SHA-256 of the images as 8-bit pixels, and the labels."""
        parts = torch.split(self.images, DIGEST_BATCH)  # no float copy of all images
        return ImageSet(torch.cat([(part * 255).round().to(torch.uint8) for part in parts]), self.labels).digest()

    def exact_digest(self) -> str:
        """Return the SHA-256 of every bit of the images, and the labels."""
        sha256 = hashlib.sha256(repr((self.images.dtype, tuple(self.images.shape))).encode())
        for values in (self.images, self.labels):
            sha256.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return sha256.hexdigest()


def gather(data: Data, num_images: int | None, seed: int) -> EvaluationData:
    """Return images and labels on the CPU, checked; `num_images` of them, drawn by `seed`, in the order of `data`.

    Of data whose images cannot be counted before they are read, these are the first ones; see `loaders.read`.

    Raises:
        InputError: no images N×C×H×W in [0, 1], or no labels that fit them.
    """
    if num_images is not None:
        check_count("num_images", num_images)
    images, labels, ids = read(data, num_images, seed)
    images = check_images(images).detach().cpu()
    labels = check_labels(labels, len(images)).cpu()
    if ids is not None:
        return EvaluationData(images, labels, ids)
    if num_images is None or num_images >= len(images):
        return EvaluationData(images, labels, torch.arange(len(images)))
    chosen = draw_images(len(images), num_images, seed)
    return EvaluationData(images[chosen], labels[chosen], chosen)


def fingerprint(classifier: nn.Module, images: Tensor, device: torch.device) -> tuple[str, int]:
    """Return a hash of a classifier's type and its logits of the first images, and its number of classes.

    The hash identifies what weights do not: code and plain attributes. Both are empty, "" and 0, if the classifier
    raises an error or returns no logits; classifying the images reports why.

    Raises:
        InputError: its weights are not loaded, or it changes the images that it is given.
    """
    if device.type == "meta" or any(isinstance(p, nn.UninitializedParameter) for p in classifier.parameters()):
        raise InputError("the classifier's weights hold no values yet (meta device, lazy modules); load them first")
    x = images[:4].to(device, copy=True)
    before = x.clone()
    try:
        with evaluating(classifier), reproducible(torch.Generator().manual_seed(0)), torch.no_grad():
            logits = classifier(x)
    except Exception:
        return "", 0
    if not torch.equal(x, before):
        raise InputError(
            "the classifier changes its input in place, so attacks lose their images; let it work on a copy"
        )
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.is_complex() or logits.layout != torch.strided:
        return "", 0
    values = " ".join(f"{value:.3e}" for value in logits.float().flatten().tolist())
    kind = f"{type(classifier).__module__}.{type(classifier).__qualname__}"
    return hashlib.sha256(f"{kind} {values}".encode()).hexdigest(), logits.shape[1]


def check_radii(eps: float | Sequence[float], norm: Norm) -> tuple[float, ...]:
    """Return the radii, checked, smallest first."""
    if isinstance(eps, str):
        raise InputError(f"eps must be a number or several, found the text {eps!r}")
    lp_ball(norm)
    several = eps if isinstance(eps, Iterable) and getattr(eps, "ndim", None) != 0 else [eps]
    radii = sorted({check_eps(e, norm, zero=True) for e in several})
    if not radii:
        raise InputError("eps must hold at least one radius, found none")
    return tuple(radii)


def check_certified(
    certified: float | Sequence[float] | None, eps: float | Sequence[float], radii: Sequence[float]
) -> tuple[float, ...]:
    """Return the certified accuracy at each radius, smallest first; empty if there is none.

    Args:
        certified: a fraction, which holds at all radii, or one for each radius of `eps`.
        eps: radius or radii as given.
        radii: the same, checked, smallest first.

    Raises:
        InputError: not a fraction, or not one for each radius.
    """
    if certified is None:
        return ()
    values = list(certified) if isinstance(certified, Iterable) else [certified]
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise InputError(f"certified_accuracy must be a fraction in [0, 1], found {value!r}; 65 % is 0.65")
    if len(values) == 1:
        return tuple(map(float, values * len(radii)))
    given = list(eps) if isinstance(eps, Iterable) else [eps]
    if len(values) != len(given):
        raise InputError(
            f"certified_accuracy must be one fraction, or one for each of the {len(given)} radii, found {len(values)}"
        )
    by_radius = {float(radius): float(value) for radius, value in zip(given, values, strict=True)}
    return tuple(by_radius[radius] for radius in radii)


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """Raise an InputError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "" if isinstance(value, int) else "a whole number, "
        raise InputError(f"{name} must be {kind}at least {least}, found {value!r}")


def check_module(classifier: Any, name: str = "classifier") -> nn.Module:
    """Return a classifier if it is a module."""
    if not isinstance(classifier, nn.Module):
        raise InputError(f"{name} must be a torch.nn.Module, found {type(classifier).__name__}")
    return classifier


def device_of(classifier: nn.Module, images: Tensor) -> torch.device:
    """Return the device of the classifier's weights; that of the images if it has none."""
    tensors = [*classifier.parameters(), *classifier.buffers()]
    return tensors[0].device if tensors else images.device


def block_size(num_images: int, batch_size: int | None) -> int:
    """Return the number of images that one rank attacks at a time, and that the ledger takes at a time.

    It depends on the arguments of the evaluation alone: not on ranks, machine, or the batch size that memory allows.
    """
    return max(min(max(-(-num_images // MIN_BLOCKS), SMALLEST_BLOCK), LARGEST_BLOCK), batch_size or 1)


def auto_batch_size(images: Tensor, device: torch.device, block: int) -> int:
    """Return the first batch size to try: a block on a GPU; on a CPU a power of two that keeps features in memory."""
    if device.type == "cuda":
        return block
    fits = max(CPU_BATCH_VALUES // images[0].numel(), 1)
    return min(1 << (fits.bit_length() - 1), CPU_BATCH_SIZE, block)


class NormalisedInput(nn.Module):
    """A classifier of normalised images: undoes mean and std before it."""

    def __init__(self, classifier: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.classifier = classifier
        self.mean, self.std = nn.Buffer(mean.clone()), nn.Buffer(std.clone())

    def forward(self, normalised: Tensor) -> Tensor:
        """Classify normalised images N×C×H×W: logits N×K."""
        logits: Tensor = self.classifier(normalised * self.std + self.mean)
        return logits


def in_space(
    classifier: nn.Module, images: ImageSet, space: Literal["pixels", "normalised"]
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Return classifier and (images, labels) to evaluate in `space`, as the published CALTECH evaluation does.

    In `normalised` space images are (x - mean) / std, clamped to [0, 1] as the published attacks clamp them: pixels
    below the mean become the mean, and eps 8/255 is 8/255 · std in pixels. Attacks see the logits only.

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
