"""The doctor: checks before an evaluation that need no attack, on classifiers and data of any kind.

It corrects its copy of the inputs after each failed check (scales images, takes the logits out of a tuple), so that one
problem does not hide the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.attacks.adaptive import View, as_classifier, views
from robustfpd.attacks.base import preserve_state, reproducible
from robustfpd.attacks.half_precision import HALF, SinglePrecision
from robustfpd.errors import InputError
from robustfpd.evaluation.attack_runner import AttackRunner
from robustfpd.evaluation.checks import CLASSIFIER_CHECKS, SETTING_CHECKS, inputs, outputs
from robustfpd.evaluation.checks.context import CheckContext, judge, run_check, skipped
from robustfpd.evaluation.inputs import EvaluationData, check_count, check_module, device_of
from robustfpd.evaluation.loaders import draw_images, read
from robustfpd.evaluation.record import Check
from robustfpd.rng import generator

DOCTOR_CHECKS = (
    "answers", "output", "input-kept", "labels", "speed", "constant-output", "precision", "classes", "normalisation",
    "channel-order", "label-order",
)  # fmt: skip
"""Checks that only the doctor runs."""
RADIUS = 8 / 255  # of the L∞ balls in which logits and gradients are checked
FEWEST_IMAGES = 20  # below this, low accuracy is not explained
SLOW = 0.25  # seconds per image from which the speed is suspicious
SECONDS = 2.0  # of one pass over all images; slow classifiers are checked on fewer
PASSES = 1000 * 40 * 3  # of 1,000 images under PGD-40; a backward pass costs two forward passes
OVERSHOOT = 0.25  # distance outside [0, 1] that resizing with bicubic or Lanczos filters reaches at most
Function = Callable[[Any], Any]
_BLINDING = ("finite-outputs", "constant-output")
_REQUIRES: dict[str, tuple[str, ...]] = {
    "stays-in-evaluation-mode": (),
    "finite-outputs": (),
    "constant-output": ("finite-outputs",),
    "precision": (),
    "randomised-outputs": ("stays-in-evaluation-mode", *_BLINDING),
    "batch-composition": ("stays-in-evaluation-mode", "randomised-outputs", *_BLINDING),
    "squashed-outputs": _BLINDING,
    "vanishing-gradients": ("squashed-outputs", *_BLINDING),
    "gradient-agreement": ("squashed-outputs", "vanishing-gradients", "randomised-outputs", "precision", *_BLINDING),
}  # fmt: skip
"""Checks of the classifier, with those that must pass first: one fault shows in several checks."""
_OF_LOGITS: dict[str, Callable[[Tensor], Check | None]] = {
    "finite-outputs": outputs.nonfinite_logits,
    "constant-output": outputs.constant_output,
    "precision": outputs.precision,
    "squashed-outputs": outputs.log_probabilities,
}
"""Checks of the logits of all images, before those of an evaluation under the same name."""


class _Repaired(nn.Module):
    """A classifier with a function applied to its input, or with the logits selected from its output."""

    def __init__(self, classifier: nn.Module, before: Function | None = None, *, select_logits: bool = False) -> None:
        super().__init__()
        self.classifier, self.training = classifier, classifier.training
        self.before, self.select_logits = before, select_logits

    def forward(self, images: Tensor) -> Any:
        output = self.classifier(images if self.before is None else self.before(images))
        return outputs.logits_in(output)[0] if self.select_logits else output


def diagnose(
    classifier: nn.Module, data: Any, *, num_images: int = 64, num_classes: int | None = None, seed: int = 0
) -> list[Check]:
    """Check a classifier and its data for problems that would invalidate an evaluation, without running an attack.

    Args:
        classifier: any module, images N×C×H×W → logits N×K, or one of our models. Its modes are restored.
        data: (images, labels) or a loader of such batches, in any range and form; see `evaluate`.
        num_images: number of images, drawn by `seed`; at least 20 to explain a low accuracy.
        num_classes: number of classes of the data; None takes the classifier's.
        seed: seed of the choice of images and of the checks.

    Returns:
        All checks. `failed`: an evaluation would be misleading, apply the fix first; `suspicious`: it may be;
        `skipped`: another check must pass first.

    Raises:
        InputError: the classifier is not a module, or the data hold no images.
    """
    classifier = as_classifier(check_module(classifier))
    check_count("num_images", num_images)
    if torch.is_inference_mode_enabled():
        raise InputError("gradients cannot be checked inside torch.inference_mode(); call diagnose outside of it")
    images, labels, ids = read(data, num_images, seed)
    if not isinstance(images, Tensor) or images.ndim != 4 or images.numel() == 0:
        found = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"images must be a tensor N×C×H×W with at least one image, found {found}")
    indices = draw_images(len(images), num_images, seed) if ids is None else torch.arange(len(images))
    if isinstance(labels, Tensor):
        labels = labels.detach().cpu().reshape(labels.shape or (1,))  # a scalar has no length
        labels = labels[indices] if len(labels) == len(images) else labels
    check, images, to_given_scale = _check_pixels(images.detach().cpu()[indices])
    if to_given_scale is not None:
        classifier = _Repaired(classifier, before=to_given_scale)
    return [check, *_check_classifier(classifier, images, labels, num_classes, seed)]


def _check_pixels(images: Tensor) -> tuple[Check, Tensor, Function | None]:
    """Check form and range; return also the images in [0, 1], and a function to the given scale if normalised."""
    low, high = float(images.amin()), float(images.amax())
    form, to_given_scale = f"{images.dtype} {tuple(images.shape[1:])}, pixels in [{low:.4g}, {high:.4g}]", None
    if images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        evidence, fix = f"{form}: channels come last", "put channels first: images = images.permute(0, 3, 1, 2)"
        _, images, to_given_scale = _check_pixels(images.permute(0, 3, 1, 2))
    elif not images.is_floating_point():
        scale = 255 if high > 1 else 1
        evidence, fix = f"{form}: integers", f"make them floats in [0, 1]: images = images.float() / {scale}"
        images = images.float() / scale
    elif bad := int((~images.isfinite()).flatten(1).any(dim=1).sum()):
        evidence = f"NaN or infinite pixels in {bad} of {len(images)} images"
        fix = "find their cause (a division by a zero std?), or drop them: images[images.isfinite()...]"
        images = images.nan_to_num(0, 1, 0).clamp(0, 1)
    elif low >= 0 and high <= 1:
        divided_twice = 0 < high <= 1.001 * inputs.GREY_LEVEL
        return _as_failed(inputs.images_in_range(images)), (255 * images).clamp(0, 1) if divided_twice else images, None
    elif low >= 0 and high > 2:
        evidence, fix = f"{form}: grey levels", "divide by 255: images = images.float() / 255"
        images = (images / 255).clamp(0, 1)
    elif low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
        evidence = f"{form}: slightly outside [0, 1]"
        fix = "clamp what resizing leaves outside: images = images.clamp(0, 1)"
        images = images.clamp(0, 1)
    else:
        evidence = f"{form}: normalised, so that the unit of eps is unknown"
        fix = "give images in [0, 1] and normalise inside the model: "
        fix += "nn.Sequential(torchvision.transforms.Normalize(mean, std), model)"
        images, to_given_scale = (images - low) / (high - low), lambda x: low + (high - low) * x
    return judge("images-in-range", True, evidence, fix, "failed"), images, to_given_scale


def _check_classifier(
    classifier: nn.Module, images: Tensor, labels: Any, num_classes: int | None, seed: int
) -> list[Check]:
    """Run all checks of a classifier, on images N×C×H×W in [0, 1] and labels in any form."""
    device = device_of(classifier, images)
    few = images[:4].to(device)
    with preserve_state(classifier):
        check, output = outputs.answers(classifier, few)
    if check.outcome == "failed":
        return [check]
    as_tensor = classifier if isinstance(output, Tensor) else _Repaired(classifier, select_logits=True)
    checks = [check, _as_failed(inputs.training_mode(as_tensor, images))]
    with preserve_state(classifier), reproducible(generator(seed, "doctor")):
        check, has_logits = outputs.output_form(output, len(few))
        checks.append(check)
        if not has_logits:
            return checks
        if check.outcome == "failed":
            classifier = _Repaired(classifier, select_logits=True)
        checks.append(outputs.input_kept(classifier, few))
        if checks[-1].outcome == "failed":
            classifier = _Repaired(classifier, before=torch.clone)
        classes = _logits(classifier, images[:1], device).shape[1]
        check, integers = inputs.label_values(labels, len(images), num_classes or classes)
        speed, count = _speed(classifier, images.to(device))
        images, labels = images[:count], None if integers is None else integers[:count]
        logits = _logits(classifier, images, device)
        if images.dtype in HALF:
            classifier, images = SinglePrecision(classifier, images.dtype), images.float()
        checks += [check, speed]
        checks += _checks_in_order(_context(classifier, images, logits, device, seed), logits, checks)
        evidence = f"{classes} logits" + (f" for {num_classes} classes" if num_classes else "; classes not given")
        fix = f"train a head of {num_classes} logits, or return those of the data's classes: model(images)[:, classes]"
        checks.append(judge("classes", classes != (num_classes or classes), evidence, fix, "failed"))
        faults = [c.name for c in checks if c.name in ("labels", "classes", *_BLINDING) and c.outcome == "failed"]
        if labels is None or set(faults) - {"labels"}:
            return [*checks, _requires("clean-accuracy", faults)]
        return checks + _accuracy(lambda x: _logits(classifier, x, device).argmax(dim=1), images, labels, logits)


def _checks_in_order(context: CheckContext, logits: Tensor, earlier: list[Check]) -> list[Check]:
    """Run the checks of logits and gradients, each only if those that it requires passed."""
    made: list[Check] = []
    for name, required in _REQUIRES.items():
        faults = [c.name for c in (*earlier, *made) if c.name in required and c.outcome in ("suspicious", "failed")]
        check = _requires(name, faults) if faults else None
        if check is None and name in _OF_LOGITS:
            check = _OF_LOGITS[name](logits)
        if check is None:
            of_evaluation = SETTING_CHECKS.get(name) or CLASSIFIER_CHECKS[name]
            check = _as_failed(run_check(name, partial(of_evaluation, context)))
        made.append(check)
    return made


def _accuracy(classify: inputs.Classify, images: Tensor, labels: Tensor, logits: Tensor) -> list[Check]:
    """Check the accuracy, and explain it if other pixels or another order of the classes improve it clearly."""
    predictions, classes = logits.argmax(dim=1), logits.shape[1]
    correct = predictions == labels
    check = _as_failed(inputs.better_than_chance(predictions, labels, classes))
    if len(labels) < FEWEST_IMAGES:
        reason = f"{len(labels)} images are too few, {FEWEST_IMAGES} are needed"
        return [check, *(skipped(name, reason) for name in ("normalisation", "channel-order", "label-order"))]
    explanations = [
        inputs.normalisation(classify, images, labels, correct),
        inputs.channel_order(classify, images, labels, correct),
        inputs.label_order(predictions, labels, classes),
    ]
    best = max(explanations, key=lambda explanation: explanation.values["gained"])
    if best.outcome == "passed":
        return [check, *explanations]
    explained = skipped(check.name, f"{check.evidence}, which {best.name} explains")
    return [explained, *(e if e is best else _requires(e.name, [best.name]) for e in explanations)]


@torch.no_grad()
def _speed(classifier: nn.Module, images: Tensor) -> tuple[Check, int]:
    """Time the classifier; return also how many images it classifies in `SECONDS`, at least 8."""

    def seconds_per_image(x: Tensor) -> float:
        start = time.perf_counter()
        classifier(x.clone()).cpu()  # waits for the device
        return (time.perf_counter() - start) / len(x)

    seconds_per_image(images[:8])  # the first pass may allocate and compile
    seconds = seconds_per_image(images[:8])
    if seconds < SLOW / 5:  # overhead dominates in small batches
        seconds = min(seconds_per_image(images) for _ in range(2))
    evidence = f"{1000 * seconds:.3g} ms per image; 1,000 images under PGD-40 take about "
    evidence += f"{seconds * PASSES / 60:,.1f} minutes"
    fix = "evaluate on a GPU (--device cuda), fewer images (--num-images 200), and with suite quick first"
    return judge("speed", seconds > SLOW, evidence, fix), max(8, int(SECONDS / max(seconds, 1e-9)))


@torch.no_grad()
def _logits(classifier: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """Return logits N×K on the CPU."""
    return torch.cat([classifier(batch.to(device, copy=True)).cpu() for batch in torch.split(images, 64)])


def _context(classifier: nn.Module, images: Tensor, logits: Tensor, device: torch.device, seed: int) -> CheckContext:
    """Return the context of an evaluation in which every prediction is correct: labels may be wrong."""
    predictions = logits.argmax(dim=1)
    runner = AttackRunner(
        classifier, EvaluationData(images, predictions, torch.arange(len(images))), device, "linf", seed, 64,
        logits.shape[1],
    )  # fmt: skip
    runner.clean_predictions = predictions
    runner.set_views({name: View(module) for name, module in views(classifier).items()})
    return CheckContext(runner, torch.ones(len(images), dtype=torch.bool), (RADIUS,), probes=1)


def _as_failed(check: Check) -> Check:
    """Return a check of an evaluation as failed where it is suspicious: before an evaluation it can be fixed."""
    failed = check.outcome == "suspicious" and check.name != "gradient-agreement"  # which attacks may overcome
    return check.model_copy(update={"outcome": "failed"}) if failed else check


def _requires(name: str, faults: list[str]) -> Check:
    return skipped(name, f"run again once {' and '.join(faults)} is fixed")
