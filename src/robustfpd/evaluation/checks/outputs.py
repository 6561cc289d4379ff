"""Checks of the classifier's outputs: logits, finite, equal from pass to pass and in every batch."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.attacks.norms import lp_ball
from robustfpd.errors import first_line
from robustfpd.evaluation.checks.context import FIXES, CheckContext, judge
from robustfpd.evaluation.record import Check

TOLERANCE = 1e-3
"""Logits that differ by less than this share of their spread are equal: rounding differs between batch sizes."""
PASSES = 5
POINTS = 3  # random points of each ball at which logits must be finite
SATURATED = 0.2  # share of logits at a common bound that is suspicious


@torch.no_grad()
def randomised_outputs(context: CheckContext) -> Check:
    """Check that logits are the same in every pass."""
    logits = torch.stack([context.classifier(context.images).float() for _ in range(PASSES)])  # passes N K
    tolerance = max(TOLERANCE, context.rounding)
    return _equal("randomised-outputs", logits[0], logits, f"in {PASSES} passes", tolerance)


@torch.no_grad()
def finite_outputs(context: CheckContext) -> Check:
    """Check that logits are finite at random points of the balls."""
    x, draws, ball = context.images, context.generator("finite-outputs"), lp_ball(context.norm)
    bad = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for eps in context.radii:
        for _ in range(POINTS):
            near = (x + ball.sample(x, eps, draws)).clamp(0, 1)
            bad |= ~context.classifier(near).isfinite().all(dim=1)
    count = int(bad.sum())
    evidence = f"NaN or infinite logits at random points of the balls around {count} of {len(x)} images"
    return judge("finite-outputs", count > 0, evidence, images=count)


@torch.no_grad()
def squashed_outputs(context: CheckContext) -> Check:
    """Check that outputs are logits: neither probabilities nor saturated at a bound."""
    name, logits = "squashed-outputs", context.classifier(context.images).float()
    probabilities = float(logits.min()) >= 0 and bool((logits.sum(dim=1) - 1).abs().max() < max(1e-3, context.rounding))
    bound = float(logits.abs().max())
    saturated = float((logits.abs() >= bound * (1 - 1e-3)).float().mean())
    values = {"saturated": saturated, "bound": bound, "classes": float(logits.shape[1])}
    if probabilities:
        evidence = f"each row of outputs is a distribution (largest {bound:.4g}), not logits"
        return judge(name, True, evidence, **values)
    evidence = f"{saturated:.2%} of the outputs lie at their common bound {bound:.4g}"
    if saturated > SATURATED:
        evidence += "; attacks use the pre-squash logits too" if context.has_pre_squash else ", where gradients vanish"
    return judge(name, saturated > SATURATED and not context.has_pre_squash, evidence, **values)


@torch.no_grad()
def batch_composition(context: CheckContext) -> Check:
    """Check that logits of an image do not depend on the other images of its batch."""
    x = context.images
    batch = context.classifier(x).float()
    single = torch.cat([context.classifier(image).float() for image in torch.split(x, 1)])
    order = torch.randperm(len(x), generator=context.generator("batches")).to(x.device)
    shuffled = torch.empty_like(batch)
    shuffled[order] = context.classifier(x[order]).float()
    others = torch.stack([single, shuffled])  # 2 N K
    tolerance = 10 * max(TOLERANCE, context.rounding)
    return _equal("batch-composition", batch, others, "alone or in another order", tolerance)


def _equal(name: str, logits: Tensor, others: Tensor, described: str, tolerance: float) -> Check:
    """Check that logits N×K are equal to `others`, P×N×K, up to a share of their spread."""
    spread = float(logits.std(dim=1).mean().clamp_min(1e-12))  # mean over the images
    difference = float((others - logits).abs().amax()) / spread
    changed = int((others.argmax(dim=2) != logits.argmax(dim=1)).any(dim=0).sum())
    evidence = f"{described}, {changed} of {len(logits)} predictions changed, and logits by "
    evidence += f"{difference:.2%} of their spread"
    return judge(name, difference > tolerance, evidence, changed=changed, largest_difference=difference)


def wrapper_accuracy(context: CheckContext) -> Check:
    """Check that the views under attack predict what the classifier predicts, also while gradients are recorded."""
    x, y = context.images, context.labels
    most, worst = 0, ""
    for name, view in context.runner.views.items():
        if view.surrogate:
            continue
        with torch.no_grad():
            differing = view.module(x).argmax(dim=1) != y
        with torch.enable_grad():  # a classifier may behave differently while it is attacked
            differing |= view.module(x.clone().requires_grad_()).argmax(dim=1) != y
        if int(differing.sum()) > most:
            most, worst = int(differing.sum()), name
    evidence = f"the views under attack classify {len(x) - most} of {len(x)} images as the classifier does"
    evidence += f", with and without gradients{f' ({worst})' if worst else ''}"
    return judge("wrapper-accuracy", most > 0, evidence, differing=most)


# Checks that only the doctor runs


@torch.no_grad()
def answers(classifier: nn.Module, images: Tensor) -> tuple[Check, Any]:
    """Check that the classifier accepts the images; return its output too."""
    name, shape = "answers", tuple(images.shape[1:])
    try:
        return judge(name, False, f"the classifier accepts images {shape}"), classifier(images.clone())
    except Exception as error:  # a classifier may raise anything
        evidence = f"{type(error).__name__} on images {tuple(images.shape)}: {first_line(error)}"
    dtypes = {p.dtype for p in classifier.parameters() if p.is_floating_point()}
    fix = f"make it take images {shape}: another size (--image-size), or a layer that adapts channels"
    if dtypes and dtypes != {images.dtype}:
        fix = f"its weights are {', '.join(sorted(map(str, dtypes)))}: model = model.float()"
    elif images.shape[1] == 1:
        with suppress(Exception):
            classifier(images.repeat(1, 3, 1, 1))
            fix = "it takes three channels: use a module whose forward returns model(images.repeat(1, 3, 1, 1))"
    return judge(name, True, evidence, fix, "failed"), None


def output_form(output: Any, count: int) -> tuple[Check, bool]:
    """Check that the output for `count` images is one tensor of logits N×K; return also if `logits_in` finds them."""
    name, (logits, code) = "output", logits_in(output)
    kind = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
    if logits is None or logits.ndim != 2 or len(logits) != count or logits.shape[1] < 2:
        fix = "return one row of at least two logits per image; for one score s: torch.stack([-s / 2, s / 2], dim=1)"
        return judge(name, True, f"{kind} for {count} images, not logits N×K", fix, "failed"), False
    if not code:
        return judge(name, False, f"logits {tuple(logits.shape)} for {count} images"), True
    fix = f"wrap it in a module whose forward returns model(images){code}"
    return judge(name, True, f"{kind} for {count} images, not a tensor of logits N×K", fix, "failed"), True


def logits_in(output: Any) -> tuple[Tensor | None, str]:
    """Return the logits in a named field, tuple, dict or map of one pixel, if any, and the code that selects them."""
    code = ""
    if isinstance(output, dict):
        key = "logits" if "logits" in output else next(iter(output), None)
        output, code = output.get(key), f"[{key!r}]"
    elif hasattr(output, "logits"):
        output, code = output.logits, ".logits"
    elif isinstance(output, (tuple, list)) and output:
        output, code = output[0], "[0]"
    elif isinstance(output, Tensor) and output.ndim == 4 and output.shape[2:].numel() == 1:
        output, code = output.flatten(1), ".flatten(1)"  # N K 1 1 -> N K
    return output if isinstance(output, Tensor) else None, code


@torch.no_grad()
def input_kept(classifier: nn.Module, images: Tensor) -> Check:
    """Check that the classifier does not change its input in place."""
    given = images.clone()
    classifier(given)
    changed = not torch.equal(given, images)
    evidence = "the classifier changes its input in place" if changed else "the input is unchanged after a pass"
    fix = "work on a copy: x = (x - mean) / std instead of x.sub_(mean).div_(std)"
    return judge("input-kept", changed, evidence, fix, "failed")


def nonfinite_logits(logits: Tensor) -> Check | None:
    """Return a failed check if logits of the images themselves are NaN or infinite."""
    name, bad = "finite-outputs", int((~logits.isfinite().all(dim=1)).sum())
    evidence = f"NaN or infinite logits for {bad} of {len(logits)} images"
    return judge(name, True, evidence, "", "failed") if bad else None


def constant_output(logits: Tensor) -> Check:
    """Check that logits differ from image to image."""
    logits = logits.float()
    between_images = float(logits.std(dim=0).max()) if len(logits) > 1 else float("nan")
    between_classes = float(logits.std(dim=1).mean())
    evidence = f"logits differ by {between_images:.3g} between images, by {between_classes:.3g} between classes"
    fix = "check that the weights were loaded (load_state_dict's missing keys) and that forward uses its input"
    bad = between_images <= TOLERANCE * between_classes or between_images == 0
    return judge("constant-output", bad, evidence, fix, "failed")


def precision(logits: Tensor) -> Check:
    """Check that logits are float32 or float64."""
    bad = logits.dtype not in (torch.float32, torch.float64)
    fix = "evaluate in single precision: model = model.float(), and no autocast"
    return judge("precision", bad, f"logits are {logits.dtype}", fix)


def log_probabilities(logits: Tensor) -> Check | None:
    """Return a suspicious check if outputs are those of log_softmax or sigmoid."""
    name, logits = "squashed-outputs", logits.float()
    if bool((logits <= 0).all()) and bool((logits.exp().sum(dim=1) - 1).abs().max() < 1e-3):
        evidence = "each row is the logarithm of a distribution: attacks work, but margins are not the network's"
        return judge(name, True, evidence, "return the logits, without log_softmax")
    low, high = float(logits.min()), float(logits.max())
    if 0 <= low < 0.01 and 0.99 < high <= 1 and bool((logits.sum(dim=1) - 1).abs().max() >= 1e-3):
        evidence = f"all outputs lie in [0, 1], from {low:.2g} to {high:.4g}: a sigmoid?"
        return judge(name, True, evidence, FIXES[name])
    return None
