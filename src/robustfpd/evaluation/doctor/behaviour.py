"""How a classifier answers: whether it does, in what form, and always the same."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.errors import first_line
from robustfpd.evaluation.checks import gradients, outputs
from robustfpd.evaluation.checks.context import CheckContext, guarded
from robustfpd.evaluation.checks.inputs import stays_in_evaluation, training_mode
from robustfpd.evaluation.doctor.finding import Finding, Patient, found, told

SLOW = 0.25
"""Seconds for one image above which evaluations take days: 1,000 images under PGD-40 take 40,000 passes and back."""
QUICK = 0.05
"""Seconds an image below which all images are timed together."""
PASSES = 1000 * 40 * 3
"""A pass back costs two forward."""
SMALL = 8
"""Images that are looked at, at least."""
SECONDS = 2.0
"""That one pass over all images may take; of slow classifiers fewer images are looked at."""


class Unwrapped(nn.Module):
    """A classifier whose logits were taken out of what it returns."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Classify images."""
        logits = logits_in(self.classifier(images))
        assert logits is not None
        return logits


class OnCopies(nn.Module):
    """A classifier that may change the images it is given."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Classify images."""
        logits: Tensor = self.classifier(images.clone())
        return logits


def answers(patient: Patient) -> Finding:
    """Does it take the images at all?"""
    x = patient.images[:4]
    try:
        patient.bare = isinstance(patient.ask(x), Tensor)
    except Exception as error:  # a classifier may raise anything
        evidence = f"{type(error).__name__} on images {tuple(x.shape)}: {first_line(error)}"
        return found("answers", True, evidence, _taking(patient, x))
    return found("answers", False, f"it takes images {tuple(x.shape[1:])}", "")


def _taking(patient: Patient, images: Tensor) -> str:
    """What to do about a classifier that does not take the images."""
    kinds = {p.dtype for p in patient.given.parameters() if p.is_floating_point()}
    if kinds and kinds != {images.dtype}:
        return "its weights are " + ", ".join(sorted(map(str, kinds))) + ": model = model.float()"
    if images.shape[1] == 1:
        with suppress(Exception):
            patient.ask(images.repeat(1, 3, 1, 1))
            return "it takes three channels: hand over a module whose forward returns model(images.repeat(1, 3, 1, 1))"
    return (
        f"make it take images {tuple(images.shape[1:])}: another size (--image-size), or a layer that adapts channels"
    )


def output(patient: Patient) -> Finding:
    """Are the answers logits N×K, in one tensor?"""
    x = patient.images[:4]
    said = patient.ask(x)
    if isinstance(said, Tensor) and said.ndim == 2 and len(said) == len(x) and said.shape[1] > 1:
        return found("output", False, f"logits {tuple(said.shape)} for {len(x)} images", "")
    logits = logits_in(said)
    kind = f"shape {tuple(said.shape)}" if isinstance(said, Tensor) else type(said).__name__
    if logits is None or logits.ndim != 2 or len(logits) != len(x) or logits.shape[1] < 2:
        fix = "return one row of at least two logits per image; for one score s: torch.stack([-s / 2, s / 2], dim=1)"
        return found("output", True, f"{kind} for {len(x)} images, not logits N×K", fix)
    patient.classifier = Unwrapped(patient.classifier).eval()
    fix = f"wrap it in a module whose forward returns model(images){_where(said)}"
    return found("output", True, f"{kind} for {len(x)} images, not a tensor of logits N×K", fix)


def _where(said: Any) -> str:
    """The code that takes the logits out."""
    if isinstance(said, Tensor):
        return ".flatten(1)"
    if isinstance(said, dict):
        return f"[{'logits' if 'logits' in said else next(iter(said))!r}]"
    return ".logits" if hasattr(said, "logits") else "[0]"


def logits_in(said: Any) -> Tensor | None:
    """Logits among what is often returned instead: named fields, tuples, maps of one pixel."""
    if isinstance(said, Tensor):
        return said.flatten(1) if said.ndim == 4 and said.shape[2:].numel() == 1 else said
    if isinstance(said, dict):
        said = said.get("logits", next(iter(said.values()), None))
    elif hasattr(said, "logits"):
        said = said.logits
    elif isinstance(said, (tuple, list)) and said:
        said = said[0]
    return said if isinstance(said, Tensor) else None


def input_kept(patient: Patient) -> Finding:
    """Are the images what they were after it was asked?"""
    x = patient.images[:4].to(patient.device, copy=True)
    before = x.clone()
    with torch.no_grad():
        patient.classifier(x)
    changed = not torch.equal(x, before)
    if changed:
        patient.classifier = OnCopies(patient.classifier).eval()
    evidence = "it changes the images it is given in place" if changed else "images are what they were after a pass"
    fix = "work on a copy: x = (x - mean) / std instead of x.sub_(mean).div_(std)"
    return found("input-kept", changed, evidence + (", so attacks lose theirs" if changed else ""), fix)


def handed_over_mode(patient: Patient) -> Finding:
    """Does it answer otherwise in the modes in which it was handed over?"""
    asked = patient.classifier
    if not patient.bare:  # the check compares tensors
        asked = Unwrapped(asked)
        asked.training = patient.classifier.training
    check = training_mode(asked, patient.images, patient.device)
    return told(check, "call model.eval() before it is handed over")


def stays(patient: Patient, subject: CheckContext) -> Finding:
    """Does .eval() reach all of it?"""
    fix = "let train(mode) pass its mode on to all children, and self.training follow it; or freeze with model.eval()"
    return told(stays_in_evaluation(subject), fix)


def finite(patient: Patient, subject: CheckContext) -> Finding:
    """Are there finite answers?"""
    lost = int((~patient.logits.isfinite().all(dim=1)).sum())
    fix = (
        "find the layer (torch.autograd.set_detect_anomaly(True)); often a division by zero, a log of 0, half precision"
    )
    if lost:
        evidence = f"NaN or infinite logits for {lost} of {len(patient.logits)} images"
        return found("finite-outputs", True, evidence, fix)
    return told(guarded("finite-outputs", lambda: outputs.finite(subject)), fix)


def constant(patient: Patient, subject: CheckContext) -> Finding:
    """Does the answer depend on the image?"""
    logits = patient.logits
    moved = float(logits.std(dim=0).max()) if len(logits) > 1 else float("nan")
    spread = float(logits.std(dim=1).mean())
    evidence = f"logits differ by {moved:.3g} from image to image, by {spread:.3g} from class to class"
    fix = "look whether the weights were loaded (load_state_dict's missing keys) and whether forward uses its input"
    return found("constant-output", moved <= outputs.SAME * spread or moved == 0, evidence, fix)


def precision(patient: Patient, subject: CheckContext) -> Finding:
    """Are logits fine enough for small steps?"""
    dtype = patient.ask(patient.images[:2]).dtype
    bad = dtype not in (torch.float32, torch.float64)
    fix = "evaluate in single precision: model = model.float(), and no autocast"
    return found("precision", bad, f"logits are {dtype}", fix, "warning")


def random(patient: Patient, subject: CheckContext) -> Finding:
    """Are answers to the same question the same?"""
    fix = (
        "turn off what draws: dropout by F.dropout(x, p, training=self.training), augmentation only in training; if it "
        "is the defence, say so beside the number"
    )
    return told(guarded("randomised-outputs", lambda: outputs.randomised(subject)), fix)


def batches(patient: Patient, subject: CheckContext) -> Finding:
    """Does an answer depend on which images are in the batch?"""
    fix = "use running statistics (F.batch_norm(..., training=self.training)) and no means over dim 0"
    return told(guarded("batch-composition", lambda: outputs.batches(subject)), fix)


def squashed(patient: Patient, subject: CheckContext) -> Finding:
    """Are these logits, and not probabilities, their logarithms, or saturated squashings?"""
    fix = "return the logits, without the last softmax, sigmoid or tanh"
    logits = patient.logits
    if bool((logits <= 0).all()) and bool((logits.exp().sum(dim=1) - 1).abs().max() < 1e-3):
        evidence = "each row is the logarithm of a distribution: attacks work, but margins are not the network's"
        return found("squashed-outputs", True, evidence, "return the logits, without log_softmax", "warning")
    low, high = float(logits.min()), float(logits.max())
    sums = logits.sum(dim=1)
    if 0 <= low < 0.01 and 0.99 < high <= 1 and bool((sums - 1).abs().max() >= 1e-3):
        evidence = f"all outputs lie in [0, 1], from {low:.2g} to {high:.4g}: a sigmoid?"
        return found("squashed-outputs", True, evidence, fix, "warning")
    return told(guarded("squashed-outputs", lambda: outputs.squashed(subject)), fix)


def vanishing(patient: Patient, subject: CheckContext) -> Finding:
    """Are there gradients?"""
    fix = (
        "take out torch.no_grad, detach, .data, numpy, argmax and round between images and logits; where one is the "
        "defence, attack with BPDA"
    )
    return told(guarded("vanishing-gradients", lambda: gradients.vanishing(subject)), fix)


def agreement(patient: Patient, subject: CheckContext) -> Finding:
    """Do gradients tell how the margin changes?"""
    fix = (
        "a custom backward, quantisation or very steep layer? evaluate with attacks that use no gradients too (square)"
    )
    return told(guarded("gradient-agreement", lambda: gradients.agreement(subject)), fix, "warning")


def speed(patient: Patient) -> Finding:
    """How long would an evaluation take? Of slow classifiers fewer images are looked at from here on."""
    patient.ask(patient.images[:SMALL])  # the first pass may allocate and compile
    each = _seconds(patient, patient.images[:SMALL])
    if each < QUICK:  # calls, not passes, take the time of a small batch
        each = min(_seconds(patient, patient.images) for _ in range(2))
    keep = max(SMALL, int(SECONDS / max(each, 1e-9)))
    patient.images, patient.labels = patient.images[:keep], patient.labels[:keep]
    hours = each * PASSES / 3600
    evidence = f"{1000 * each:.3g} ms an image; 1,000 images under PGD-40 take about {_duration(hours)}"
    fix = "evaluate on a GPU (--device cuda), fewer images (--num-images 200), and with suite quick first"
    return found("speed", each > SLOW, evidence, fix, "warning")


def _seconds(patient: Patient, images: Tensor) -> float:
    """Seconds an image of one pass."""
    start = time.perf_counter()
    patient.ask(images)
    return (time.perf_counter() - start) / len(images)


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{60 * hours:.0f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.0f} seconds"
