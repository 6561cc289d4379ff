"""Checks of what the user handed over: modes, images, radii."""

from __future__ import annotations

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from robustfpd.attacks.base import reproducible
from robustfpd.evaluation.attack_runner import tensors
from robustfpd.evaluation.checks.context import CheckContext, judged, passed, skipped
from robustfpd.evaluation.verdict import Check
from robustfpd.models.mode import evaluating

ONE_LEVEL = 1 / 255
GUESSED = 0.05
"""How often guessing may get as many images right before an accuracy counts as more than that."""


def training_mode(classifier: nn.Module, images: Tensor, device: torch.device) -> Check:
    """Does it answer otherwise in the modes in which it was handed over?"""
    name, modules = "training-mode", list(classifier.modules())
    training = [m for m in modules if m.training]
    if not training:
        return passed(name, "all modules were handed over in evaluation mode", training=0)
    counted = f"{len(training)} of {len(modules)} modules were handed over in training mode"
    state = {key: value.detach().clone() for key, value in tensors(classifier).items()}
    x = images[:8].to(device, copy=True)
    try:
        with reproducible(torch.Generator().manual_seed(0)), torch.no_grad():
            as_given = classifier(x)
        for key, value in tensors(classifier).items():
            value.copy_(state[key])
        with reproducible(torch.Generator().manual_seed(0)), evaluating(classifier), torch.no_grad():
            evaluated = classifier(x)
        same = bool(torch.isclose(as_given, evaluated, rtol=1e-4, atol=1e-5, equal_nan=True).all())
    except Exception as error:  # whatever it is, asking in evaluation mode tells it properly
        return judged(name, True, f"{counted} and raise {type(error).__name__} there", training=len(training))
    finally:
        for key, value in tensors(classifier).items():
            value.copy_(state[key])
    if same:
        return passed(name, f"{counted}, which changes nothing in what it answers", training=len(training))
    kinds = sorted({type(m).__name__ for m in training if not list(m.children())})
    return judged(
        name, True,
        f"{counted} ({', '.join(kinds[:4])}) and answer otherwise there; attacked in evaluation mode: the number is "
        "not about the classifier as it was handed over, call .eval() on it",
        training=len(training),
    )  # fmt: skip


def images_in_range(images: Tensor) -> Check:
    """Do the images fill [0, 1]? What lies outside was refused before."""
    low, high = (float(v) for v in images.aminmax())
    evidence = f"pixels lie in [{low:.4g}, {high:.4g}]"
    dark = high <= 4 * ONE_LEVEL
    return judged("images-in-range", dark, evidence + (": divided by 255 twice?" if dark else ""), low=low, high=high)


def stays_in_evaluation(subject: CheckContext) -> Check:
    """Is any module in training mode although the whole was put in evaluation mode?"""
    left = [n for n, m in subject.runner.classifier.named_modules() if m.training]
    evidence = f"{len(left)} modules stay in training mode after .eval()" + (f", first {left[0]!r}" if left else "")
    return judged("stays-in-evaluation-mode", bool(left), evidence, modules=len(left))


def clean_accuracy(subject: CheckContext) -> Check:
    """Does it classify better than chance when nobody attacks? Else there is nothing to defend."""
    runner = subject.runner
    count, right = len(runner.labels), int((runner.clean == runner.labels).sum())
    classes = max(runner.classes, int(runner.labels.max()) + 1)
    evidence = f"{right} of {count} images are classified correctly, of {classes} classes"
    if classes**-count > GUESSED:
        return skipped("clean-accuracy", f"{evidence}: too few images to tell from guessing")
    guessed = binomtest(right, count, 1 / classes, alternative="greater").pvalue
    told = ": no better than chance, guessing does as well" if guessed > GUESSED else ""
    return judged("clean-accuracy", guessed > GUESSED, evidence + told, right=right, guessed=guessed)


def eps_units(subject: CheckContext) -> Check:
    """Is eps a radius in pixels of [0, 1] and not in grey levels, or divided twice?"""
    pixels = subject.runner.images[0].numel()
    share = {"linf": 1.0, "l2": 1 / pixels**0.5, "l1": 1 / pixels}[subject.norm]
    typical = [e * share for e in subject.radii]
    large, small = max(typical) > 0.5, max(typical) < ONE_LEVEL / 2 and subject.norm == "linf"
    smallest = max(typical) * pixels**0.5 < ONE_LEVEL / 2 and subject.norm != "linf"
    radii = ", ".join(f"{e:.4g}" for e in subject.radii)
    why = ""
    if large:
        why = ": the ball holds a uniformly grey image; in grey levels instead of pixels of [0, 1]?"
    elif small or smallest:
        why = ": less than half a grey level; divided by 255 twice?"
    return judged("eps-units", bool(why), f"eps {radii} in {subject.norm}{why}", largest=max(subject.radii))
