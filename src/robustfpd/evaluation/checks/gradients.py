"""Checks of gradients: that they exist, agree with finite differences, and point the same way nearby."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustfpd.attacks.losses import LossFunction, cross_entropy, margin
from robustfpd.attacks.norms import lp_ball
from robustfpd.evaluation.checks.context import NUM_IMAGES, AttackFindings, CheckContext, judge, skipped
from robustfpd.evaluation.record import Check

STEPS = 1e-3, 1.25e-4
"""Of the finite differences, in pixels: a quarter of a grey level, and an eighth of that.

A network with kinks (ReLU, max pooling, order statistics) leaves the plane that its gradient describes at some of them
within the first step, but at few within the second; with rounding it is the second step that is inexact.
"""
COARSE = 1e-5  # relative rounding of the classifier above which finite differences of these steps are lost
GREY_LEVEL = 1 / 255
DIRECTIONS = 4
VANISHED = 0.1  # share of images without a gradient that is suspicious
WORST = 0.15  # share of the images that decides: a defence may hide the gradients of a few classes only
DISAGREEMENT = 0.3  # squared relative error of slopes at both steps that is suspicious, for the worst images
UNEXPLAINED = 0.7  # the same at the first step, median over the images
UNSTABLE = 0.3  # cosine between gradients one grey level apart that is suspicious
FURTHEST = 16 / 255  # distance per pixel up to which gradients around an image are compared
POINTS = 4
RUGGED = 0.2  # mean cosine of gradients around an image that is suspicious
LEAST_SURVIVORS = 3


def vanishing_gradients(context: CheckContext) -> Check:
    """Check that gradients of cross-entropy and of the margin are neither zero nor NaN."""
    name, shares = "vanishing-gradients", dict[str, float]()
    for label, loss in (("ce", cross_entropy), ("margin", margin)):
        zero, nan = 0.0, 0.0
        for x in _places(context):
            gradient = _gradient(context, x, context.labels, loss)
            if gradient is None:
                evidence = "the logits do not depend differentiably on the images: no attack can use gradients"
                return judge(name, True, evidence, zero_ce=1, zero_margin=1)
            flat = gradient.flatten(1)  # N, C·H·W
            zero = max(zero, float((flat == 0).all(dim=1).float().mean()))
            nan = max(nan, float((~flat.isfinite().all(dim=1)).float().mean()))
        shares |= {f"zero_{label}": zero, f"nan_{label}": nan}
    nan = max(shares["nan_ce"], shares["nan_margin"])
    evidence = f"zero gradients of cross-entropy at {shares['zero_ce']:.0%} and of the margin at "
    evidence += f"{shares['zero_margin']:.0%} of the images or of random points of their balls, NaN at {nan:.0%}"
    return judge(name, nan > 0 or max(shares["zero_ce"], shares["zero_margin"]) > VANISHED, evidence, **shares)


def gradient_agreement(context: CheckContext) -> Check:
    """Check that gradients agree with finite differences along random directions."""
    name, errors, typical = "gradient-agreement", list[float](), list[float]()
    draws = context.generator(name)
    if context.rounding > COARSE:
        return skipped(name, "the classifier calculates in half precision, too coarse for finite differences")
    for place in _places(context):
        x = _moved(place, GREY_LEVEL, draws).clamp(STEPS[0], 1 - STEPS[0])
        gradient = _gradient(context, x, context.labels, margin)
        if gradient is None:
            return skipped(name, "there are no gradients")
        gradient = gradient.nan_to_num(0, 0, 0)
        by_step = torch.stack([_disagreement(context, x, gradient, step, draws) for step in STEPS])  # 2 N
        errors.append(float(by_step.amin(dim=0).quantile(1 - WORST)))
        typical.append(float(by_step[0].median()))
    evidence = f"gradients and finite differences differ by {errors[0]:.2g} at the images and {errors[1]:.2g} at "
    evidence += "random points of their balls (squared relative error, worst 15 % of the images), for half of the "
    evidence += f"images by {max(typical):.2g} or more at a distance of {STEPS[0]}"
    bad = max(errors) > DISAGREEMENT or max(typical) > UNEXPLAINED
    return judge(name, bad, evidence, error=errors[0], error_around=errors[1], typical_error=max(typical))


def _disagreement(
    context: CheckContext, x: Tensor, gradient: Tensor, step: float, draws: torch.Generator
) -> Tensor:  # fmt: skip
    """Return the squared error of the slopes over the squared slopes, N, from central differences of one step."""
    by_gradient, by_difference = [], []
    for _ in range(DIRECTIONS):
        u = (2 * torch.randint(0, 2, x.shape, generator=draws) - 1).to(x)
        by_gradient.append((gradient * u).flatten(1).sum(dim=1).double())
        with torch.no_grad():
            ahead, behind = (margin(context.white_box(x + s * step * u), context.labels).double() for s in (1, -1))
        by_difference.append((ahead - behind) / (2 * step))
    slopes, differences = torch.stack(by_gradient), torch.stack(by_difference)  # directions, N
    error = (slopes - differences).square().sum(dim=0)
    scale = torch.maximum(slopes.square().sum(dim=0), differences.square().sum(dim=0))
    relative = torch.where(scale > 0, error / scale.clamp_min(1e-300), torch.ones_like(scale))
    return relative.nan_to_num(1)


def gradient_stability(context: CheckContext) -> Check:
    """Check that gradients point the same way one grey level away."""
    name, cosines = "gradient-stability", list[float]()
    draws = context.generator(name)
    for x in _places(context):
        offset = (2 * torch.rand(x.shape, generator=draws) - 1).to(x) / 255
        here = _gradient(context, x, context.labels, margin)
        there = _gradient(context, (x + offset).clamp(0, 1), context.labels, margin)
        if here is None or there is None:
            return skipped(name, "there are no gradients")
        a, b = (gradient.flatten(1).nan_to_num(0, 0, 0) for gradient in (here, there))  # N, C·H·W
        cosines.append(float(torch.cosine_similarity(a, b, dim=1).quantile(WORST)))
    evidence = f"gradients one grey level apart have a cosine of {cosines[0]:.2f} at the images and {cosines[1]:.2f} "
    evidence += "at random points of their balls (worst 15 % of the images)"
    return judge(name, min(cosines) < UNSTABLE, evidence, cosine=cosines[0], cosine_around=cosines[1])


def rugged_loss(context: CheckContext, findings: AttackFindings) -> Check:
    """Check that gradients around the survivors point the same way across the ball."""
    name, survivors = "rugged-loss", torch.nonzero(findings.robust).flatten()
    if len(survivors) < LEAST_SURVIVORS:
        return skipped(name, f"{len(survivors)} images are robust, fewer than {LEAST_SURVIVORS}")
    x, y = context.take(survivors[:NUM_IMAGES])
    per_pixel = 1.0 if context.norm == "linf" else x[0].numel() ** -0.5
    distance, draws, directions = min(FURTHEST, context.radii[-1] * per_pixel), context.generator(name), []
    for _ in range(POINTS):
        gradient = _gradient(context, _moved(x, distance, draws), y, margin)
        if gradient is None:
            return skipped(name, "there are no gradients")
        directions.append(F.normalize(gradient.flatten(1).nan_to_num(0, 0, 0), dim=1))
    length = torch.stack(directions).sum(dim=0).square().sum(dim=1)  # N; POINTS² where all directions are equal
    typical = float(((length - POINTS) / (POINTS * (POINTS - 1))).median())
    evidence = f"gradients up to {distance:.2g} per pixel around {len(x)} survivors have a mean cosine of {typical:.2f}"
    return judge(name, typical < RUGGED, evidence, median_cosine=typical, distance=distance)


def _places(context: CheckContext) -> tuple[Tensor, Tensor]:
    """Return the images, and a random point of each one's smallest ball: some defences leave gradients at images."""
    x = context.images
    delta = lp_ball(context.norm).sample(x, context.radii[0], context.generator("places"))
    return x, (x + delta).clamp(0, 1)


def _moved(images: Tensor, distance: float, draws: torch.Generator) -> Tensor:
    """Move each pixel by at most `distance`, reflected into [0, 1].

    Clamping would leave many pixels equal, at the bounds, where max pooling and order statistics have kinks.
    """
    moved = images + distance * (2 * torch.rand(images.shape, generator=draws) - 1).to(images)
    return 1 - (1 - moved.abs()).abs()


def _gradient(context: CheckContext, images: Tensor, labels: Tensor, loss: LossFunction) -> Tensor | None:
    """Return the gradient of a loss for each image, N×C×H×W; None if it does not depend on them differentiably."""
    x = images.clone().requires_grad_()
    with torch.enable_grad():
        total = loss(context.white_box(x), labels).sum()
    if not total.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(total, x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient
