"""What all attacks share: one signature, its checks, and a classifier that is left as it was."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, ParamSpec

import torch
from torch import Tensor, nn

from robustfpd.attacks.inputs import check_eps, check_images, check_labels
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Norm
from robustfpd.errors import InputError
from robustfpd.models.mode import evaluating

P = ParamSpec("P")
Access = Literal["gradients", "scores", "decisions"]
ALL_NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
LIBRARIES = {"art": "adversarial-robustness-toolbox", "foolbox": "foolbox", "pyautoattack": "pyautoattack"}


@dataclass(eq=False)
class Attack(Generic[P]):
    """An attack: `attack(classifier, images, labels, *, eps, norm="linf", generator=None, …)` → adversarial images.

    The classifier is attacked in evaluation mode with frozen parameters; afterwards modes, parameters, gradients and
    the global random states are what they were. Randomness, the classifier's own included, follows `generator`.

    Raises on a call:
        InputError: images that are not N×C×H×W in [0, 1], labels that are not N classes, a radius that is none, a norm
            that the attack does not offer, a library that is not installed.
    """

    name: str
    function: Callable[P, Tensor]
    norms: tuple[Norm, ...]
    """Norms it offers."""
    minimal: bool
    """It looks for the smallest perturbation: what it returns may lie outside eps, and is the image itself where it
    found nothing."""
    access: Access
    """What it needs of the classifier: gradients, logits, or predicted classes."""
    library: str | Mapping[str, str] | None
    """The package, an extra, that does the work; by norm where it differs."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """Return adversarial images N×C×H×W in [0, 1]."""
        bound = inspect.signature(self.function).bind(*args, **kwargs)
        bound.apply_defaults()
        given: dict[str, Any] = bound.arguments
        lp_ball(given["norm"], self.norms, self.name)
        given["eps"] = check_eps(given["eps"], given["norm"])
        # A copy: a classifier that normalises in place would overwrite the caller's images.
        given["images"] = images = check_images(given["images"]).detach().clone()
        given["labels"] = check_labels(given["labels"], len(images)).to(images.device)
        if given["generator"] is None:
            given["generator"] = torch.Generator().manual_seed(0)
        self.check_library(given["norm"])
        if self.access == "gradients" and torch.is_inference_mode_enabled():
            raise InputError("gradient attacks cannot run inside torch.inference_mode(); leave it for the attack")
        with preserve_state(given["classifier"]), reproducible(given["generator"]):
            found = self.function(*bound.args, **bound.kwargs)
        if bool(((found < 0) | (found > 1)).any()):
            raise InputError(
                f"attack {self.name} ended outside [0, 1]; does the classifier change its input in place? "
                "Let it work on a copy"
            )
        return found

    @property
    def options(self) -> frozenset[str]:
        """Names of what it may be given by keyword."""
        return frozenset(inspect.signature(self.function).parameters)

    def check_library(self, norm: str) -> None:
        """Raise an InputError, which names the command that installs it, where the package is missing."""
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
    """Make an `Attack` of a function with the one signature; what it is given is checked before it is called."""

    def wrap(function: Callable[P, Tensor]) -> Attack[P]:
        made = Attack(name, function, norms, minimal, access, library)
        functools.update_wrapper(made, function)
        return made

    return wrap


@contextmanager
def preserve_state(classifier: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters for a while; then every flag and gradient is what it was.

    Libraries leave gradients behind, or zero those that they find.
    """
    parameters = list(classifier.parameters())
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    for p in parameters:
        p.grad = None
        p.requires_grad_(False)
    try:
        with evaluating(classifier):
            yield
    finally:
        for p, trains, grad in before:
            p.requires_grad_(trains)
            p.grad = grad


@contextmanager
def reproducible(generator: torch.Generator) -> Iterator[None]:
    """Seed the global random states from the generator's, without drawing from it; then put them back.

    Libraries draw from them, and so does a classifier that is random. They are the process's: run attacks in one
    thread at a time.
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
