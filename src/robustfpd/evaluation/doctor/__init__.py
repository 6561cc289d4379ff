"""What would ruin an evaluation, found in seconds, with what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from robustfpd.attacks.adaptive import as_classifier
from robustfpd.attacks.base import preserve_state, reproducible
from robustfpd.errors import InputError
from robustfpd.evaluation.checks.context import CheckContext
from robustfpd.evaluation.doctor import accuracy, behaviour
from robustfpd.evaluation.doctor.finding import Finding, Patient, found, skipped
from robustfpd.evaluation.doctor.handed_over import LABELS, look_at_images, look_at_labels, together
from robustfpd.evaluation.inputs import check_count, check_module, device_of
from robustfpd.rng import generator

__all__ = ["Finding", "diagnose"]

Look = Callable[[Patient, CheckContext], Finding]
_BLIND = ("finite-outputs", "constant-output")
"""With these nothing else can be seen."""
_LOOKS: dict[str, tuple[Look, tuple[str, ...]]] = {
    "stays-in-evaluation-mode": (behaviour.stays, ()),
    "finite-outputs": (behaviour.finite, ()),
    "constant-output": (behaviour.constant, ("finite-outputs",)),
    "precision": (behaviour.precision, ()),
    "randomised-outputs": (behaviour.random, ("stays-in-evaluation-mode", *_BLIND)),
    "batch-composition": (behaviour.batches, ("stays-in-evaluation-mode", "randomised-outputs", *_BLIND)),
    "squashed-outputs": (behaviour.squashed, _BLIND),
    "vanishing-gradients": (behaviour.vanishing, ("squashed-outputs", *_BLIND)),
    "gradient-agreement": (
        behaviour.agreement, ("squashed-outputs", "vanishing-gradients", "randomised-outputs", "precision", *_BLIND),
    ),
}  # fmt: skip
"""What is looked at, and what must be in order first: a disease shows in more than one place."""


def diagnose(
    classifier: nn.Module, data: Any, *, num_images: int = 64, num_classes: int | None = None, seed: int = 0
) -> list[Finding]:
    """Look for what ruins evaluations, in a classifier and in its data.

    Args:
        classifier: any module, images → logits, or one of our models; its modes are afterwards what they were.
        data: (images, labels) or a loader of such batches, with whatever is in them.
        num_images: how many images, drawn by `seed`.
        num_classes: how many classes the data have; None knows no more than the labels tell.
        seed: seed of the choice of images and of the looks.

    Returns:
        Everything that was looked at. Where one finding explains another, the other is skipped.

    Raises:
        InputError: no module, or data without images.
    """
    classifier = as_classifier(check_module(classifier))
    check_count("num_images", num_images)
    if torch.is_inference_mode_enabled():
        raise InputError("gradients are off for good inside torch.inference_mode(); leave it to look at them")
    images, labels = together(data)
    chosen = torch.randperm(len(images), generator=generator(seed, "images"))[:num_images].sort().values
    finding, pixels, classifier = look_at_images(images[chosen], classifier)
    seen = labels[chosen] if isinstance(labels, torch.Tensor) and len(labels) == len(images) else labels
    patient = Patient(classifier, pixels, seen, device_of(classifier, pixels), seed)
    return [finding, *_examined(patient, num_classes)]


def _examined(patient: Patient, num_classes: int | None) -> list[Finding]:
    """All about the classifier, in the order in which one thing hides another."""
    with preserve_state(patient.classifier):
        findings = [behaviour.answers(patient)]
    if findings[0].outcome == "problem":
        return findings
    findings.append(behaviour.handed_over_mode(patient))
    with preserve_state(patient.classifier), reproducible(generator(patient.seed, "doctor")):
        findings.append(behaviour.output(patient))
        if findings[-1].outcome == "problem" and not isinstance(patient.classifier, behaviour.Unwrapped):
            return findings
        findings.append(behaviour.input_kept(patient))
        classes = patient.ask(patient.images[:1]).shape[1]
        labels, mended = look_at_labels(patient.labels, len(patient.images), num_classes or classes)
        findings.append(labels)
        patient.labels = torch.zeros(len(patient.images), dtype=torch.long) if mended is None else mended
        findings.append(behaviour.speed(patient))
        patient.logits = patient.answers(patient.images)
        subject = patient.subject(patient.predictions)
        for name, (look, first) in _LOOKS.items():
            hidden = [f.name for f in findings if f.name in first and f.outcome in ("problem", "warning")]
            findings.append(skipped(name, hidden) if hidden else look(patient, subject))
        findings.append(_classes(classes, num_classes, mended))
        bad = [f.name for f in findings if f.name in (LABELS, "classes", *_BLIND) and f.outcome == "problem"]
        if mended is None or any(name != LABELS for name in bad):
            return [*findings, skipped(accuracy.ACCURACY, bad)]
        return [*findings, *accuracy.accuracy(patient)]


def _classes(logits: int, expected: int | None, labels: torch.Tensor | None) -> Finding:
    """Does it tell the data's classes apart?"""
    if expected is None:
        return found("classes", False, f"{logits} logits; nothing tells how many classes the data have", "")
    fix = f"train a head of {expected} logits, or take those of the data's classes: model(images)[:, classes]"
    return found("classes", logits != expected, f"{logits} logits for {expected} classes", fix)
