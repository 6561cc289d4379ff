"""The attack interface: one signature, checked inputs, preserved classifier state, counted passes."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, ParamSpec

import torch
from torch import Tensor, nn

from robustfpd.attacks.half_precision import HALF, SinglePrecision
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Norm, check_eps
from robustfpd.device import evaluating
from robustfpd.errors import InputError

P = ParamSpec("P")
Access = Literal["gradients", "scores", "decisions"]
ALL_NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
LIBRARIES = {"art": "adversarial-robustness-toolbox", "foolbox": "foolbox", "pyautoattack": "pyautoattack"}


@dataclass(eq=False)
class Attack(Generic[P]):
    """An attack: `attack(classifier, images, labels, *, eps, norm="linf", generator=None, ...)` → adversarial images.

    The classifier runs in evaluation mode with frozen parameters. Afterwards its training flags, parameters and
    gradients and the global random states are unchanged. All randomness, the classifier's own included, depends on
    `generator` only. Images in half precision are attacked in float32, see `SinglePrecision`.

    With `eps` 0 the images are returned unchanged, as in other libraries, and the classifier is not called; minimal
    attacks search as with any other `eps`.

    Raises on a call:
        InputError: `images` are not N×C×H×W in [0, 1]; `labels` are not N class indices; `eps` is not a valid radius;
            the attack does not offer `norm`; a required library is not installed.
    """

    name: str
    function: Callable[P, Tensor]
    norms: tuple[Norm, ...]
    """Norms it offers."""
    minimal: bool
    """It minimizes the perturbation: results may lie outside eps, and are the clean image where nothing was found."""
    access: Access
    """What it needs: gradients, logits (`scores`) or predicted classes (`decisions`)."""
    library: str | Mapping[str, str] | None
    """The optional package it runs on, or a mapping from norm to package."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """Return adversarial images, N×C×H×W in [0, 1]."""
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments: dict[str, Any] = bound.arguments
        lp_ball(arguments["norm"], self.norms, self.name)
        arguments["eps"] = check_eps(arguments["eps"], arguments["norm"], zero=True)
        # A copy: a classifier that normalises in place would overwrite the caller's images.
        arguments["images"] = images = check_images(arguments["images"]).detach().clone()
        arguments["labels"] = check_labels(arguments["labels"], len(images)).to(images.device)
        if arguments["generator"] is None:
            arguments["generator"] = torch.Generator().manual_seed(0)
        if arguments["eps"] == 0 and not self.minimal:
            return images
        self.check_library(arguments["norm"])
        if self.access == "gradients" and torch.is_inference_mode_enabled():
            raise InputError("gradient attacks cannot run inside torch.inference_mode(); leave it for the attack")
        dtype = images.dtype
        if dtype in HALF:
            arguments["classifier"] = SinglePrecision(arguments["classifier"], dtype)
            arguments["images"] = images.float()
        with preserve_state(arguments["classifier"]), reproducible(arguments["generator"]):
            adversarial = self.function(*bound.args, **bound.kwargs).to(dtype)
        if bool(((adversarial < 0) | (adversarial > 1)).any()):
            raise InputError(
                f"attack {self.name} ended outside [0, 1]; does the classifier change its input in place? "
                "Let it work on a copy"
            )
        return adversarial

    @property
    def options(self) -> frozenset[str]:
        """Names of the parameters."""
        return frozenset(inspect.signature(self.function).parameters)

    def check_library(self, norm: str) -> None:
        """Raise an InputError with the install command if the package for `norm` is not installed."""
        library = self.library if self.library is None or isinstance(self.library, str) else self.library.get(norm)
        if library is not None and importlib.util.find_spec(library) is None:
            raise InputError(
                f"attack {self.name} in {norm} needs {LIBRARIES[library]}; install it with: "
                "pip install 'robustfpd[attacks]'"
            )


def attack(
    name: str, *, norms: tuple[Norm, ...] = ALL_NORMS, minimal: bool = False, access: Access = "gradients",
    library: str | Mapping[str, str] | None = None,
) -> Callable[[Callable[P, Tensor]], Attack[P]]:  # fmt: skip
    """Decorate a function with the common signature as an `Attack`; see there for the arguments."""

    def decorate(function: Callable[P, Tensor]) -> Attack[P]:
        decorated = Attack(name, function, norms, minimal, access, library)
        functools.update_wrapper(decorated, function)
        return decorated

    return decorate


@contextmanager
def preserve_state(classifier: nn.Module) -> Iterator[None]:
    """Put the classifier in evaluation mode with frozen parameters; restore flags and gradients on exit.

    Attack libraries leave gradients behind or zero existing ones.
    """
    before = [(p, p.requires_grad, p.grad) for p in classifier.parameters()]
    for p, _, _ in before:
        p.grad = None
        p.requires_grad_(False)
    try:
        with evaluating(classifier):
            yield
    finally:
        for p, requires_grad, grad in before:
            p.requires_grad_(requires_grad)
            p.grad = grad


@contextmanager
def reproducible(generator: torch.Generator) -> Iterator[None]:
    """Seed the global random states from the state of `generator`, without drawing from it; restore them on exit.

    Attack libraries and random classifiers draw from the global states. These belong to the process, so run attacks
    in one thread at a time.
    """
    import numpy as np

    seed = int.from_bytes(hashlib.sha256(generator.get_state().numpy().tobytes()).digest()[:4], "big")
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - libraries use this one
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)


class QueryCounter(nn.Module):
    """Wrap a classifier and count the images that pass through it."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.forward_passes = 0
        """Images that went forward."""
        self.backward_passes = 0
        """Images whose gradient was computed."""
        self.per_image: Tensor | None = None
        """Forward passes of each image in the last attack, N, if the attack recorded them; see `record_queries`."""
        self.low_precision = False
        """Run the classifier in bfloat16 (autocast); logits are converted to float32."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits N×K of images N×C×H×W."""
        self.forward_passes += len(images)
        if self.low_precision:
            with torch.autocast(images.device.type, torch.bfloat16):
                output = self.classifier(images)
            logits: Tensor = output.float() if isinstance(output, Tensor) else output
        else:
            logits = self.classifier(images)
        if isinstance(logits, Tensor) and logits.requires_grad:
            logits.register_hook(self._count_backward)  # type: ignore[no-untyped-call]
        return logits

    def _count_backward(self, gradient: Tensor) -> None:
        self.backward_passes += len(gradient)

    def reset(self) -> None:
        """Set all counts to zero."""
        self.forward_passes, self.backward_passes, self.per_image = 0, 0, None


def record_queries(classifier: nn.Module, queries: Tensor | None) -> None:
    """Store an attack's forward passes per image, N, in a `QueryCounter`; other classifiers ignore them.

    None discards what a member of an ensemble recorded for some of the images.
    """
    if isinstance(classifier, SinglePrecision):
        classifier = classifier.classifier
    if isinstance(classifier, QueryCounter):
        classifier.per_image = None if queries is None else queries.detach().to("cpu", torch.long)


def check_images(images: Any) -> Tensor:
    """Return `images` if they are an N×C×H×W floating-point tensor in [0, 1]; raise an InputError otherwise."""
    if not isinstance(images, Tensor):
        raise InputError(f"images must be a torch.Tensor, found {type(images).__name__}")
    if images.ndim != 4 or images.numel() == 0:
        raise InputError(f"images must be N×C×H×W with at least one image, found shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise InputError(f"images must be floating point in [0, 1], found {images.dtype}; divide uint8 by 255")
    if not bool(images.isfinite().all()):
        raise InputError(f"images must be finite, found {int((~images.isfinite()).sum())} NaN or infinite pixels")
    low, high = (float(bound) for bound in images.detach().aminmax())
    if low < 0 or high > 1:
        hint = "divide by 255" if low >= 0 and high > 2 else "normalise inside the model, not in the data"
        raise InputError(f"images must lie in [0, 1], found [{low:.4g}, {high:.4g}]; {hint}")
    return images


def check_labels(labels: Any, count: int) -> Tensor:
    """Return `labels` as int64 if they are `count` non-negative integers; raise an InputError otherwise."""
    if not isinstance(labels, Tensor):
        raise InputError(f"labels must be a torch.Tensor, found {type(labels).__name__}")
    if labels.shape != (count,):
        raise InputError(f"labels must have shape ({count},), one per image, found {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels must be integers, found {labels.dtype}")
    if int(labels.min()) < 0:
        raise InputError(f"labels must not be negative, found {int(labels.min())}")
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
    return output


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
    """Return K, at least 2, from one forward pass of the first image, whose output must pass `check_logits`."""
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
