"""Carlini & Wagner, "Towards Evaluating the Robustness of Neural Networks", S&P 2017."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustfpd.attacks.adapters.art import cw_linf
from robustfpd.attacks.adapters.foolbox import cw_l2
from robustfpd.attacks.base import attack
from robustfpd.attacks.inputs import positive
from robustfpd.config import Norm
from robustfpd.errors import InputError


@attack("cw", norms=("linf", "l2"), minimal=True, library={"linf": "art", "l2": "foolbox"})
def cw(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
    steps: int | None = None, step_size: float | None = None, confidence: float = 0.0, initial_const: float = 0.1,
    binary_search_steps: int = 9, largest_const: float = 20.0, decrease_factor: float = 0.9,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Carlini & Wagner: least distance plus const times the margin, over tanh of the image (S&P 2017).

    L2 is foolbox's; L∞ is ART's, image by image and therefore slow. Arguments, result and errors as in `pgd`; `eps`
    and `generator` are not used.

    Options:
        steps: Adam steps per constant (and limit); None takes 200 in L2, 100 in L∞.
        step_size: Adam's learning rate in tanh space; None takes 0.1 in L2, 0.05 times the limit in L∞.
        confidence: margin by which the wrong class must win.
        initial_const: first weight of misclassification against distance.
        binary_search_steps: constants tried per image, L2 only.
        largest_const: no larger constants are tried, L∞ only; each is ten times the one before.
        decrease_factor: what the limit on every pixel is multiplied by after a success, L∞ only.
    """
    positive(initial_const=initial_const, binary_search_steps=binary_search_steps, largest_const=largest_const)
    if not 0 < decrease_factor < 1:
        raise InputError(f"decrease_factor must lie between 0 and 1, found {decrease_factor}")
    steps = steps if steps is not None else 200 if norm == "l2" else 100
    step_size = step_size if step_size is not None else 0.1 if norm == "l2" else 0.05
    positive(steps=steps, step_size=step_size)
    if norm == "l2":
        return cw_l2(
            classifier, images, labels, steps=steps, step_size=step_size, confidence=confidence,
            initial_const=initial_const, binary_search_steps=binary_search_steps,
        )  # fmt: skip
    return cw_linf(
        classifier, images, labels, steps=steps, step_size=step_size, confidence=confidence,
        initial_const=initial_const, largest_const=largest_const, decrease_factor=decrease_factor,
    )  # fmt: skip
