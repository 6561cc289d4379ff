"""Checks of gradients: there, right, and the same a little further on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustfpd.attacks.losses import LossFunction, cross_entropy, margin
from robustfpd.attacks.norms import lp_ball
from robustfpd.evaluation.checks.context import LOOKED_AT, CheckContext, Findings, judged, skipped
from robustfpd.evaluation.verdict import Check

STEP = 1e-3
"""Of the finite differences, in pixels: far above float32's rounding, a quarter of a grey level."""
COARSE = 1e-5
"""Relative rounding above which steps of that length are lost."""
DIRECTIONS = 4
VANISHED = 0.1
"""Share of images without a gradient that is suspicious."""
WORST = 0.15
"""Share of the images by which gradients are judged: a defence may hide those of a few classes only."""
DISAGREES = 0.3
"""Relative error of autograd's slopes, squared, that is suspicious; a network that is smooth stays under 0.01."""
TURNS = 0.3
"""Cosine between gradients one grey level apart below which a loss counts as rugged."""

FURTHEST = 16 / 255
"""Distance per pixel up to which gradients around an image are compared."""
POINTS = 4
RUGGED = 0.2
"""Mean cosine of these below which steps along a gradient lead nowhere; honest networks showed 0.78 and more."""
FEW = 3
"""Fewer images that stand tell nothing."""


def vanishing(subject: CheckContext) -> Check:
    """Are there gradients of cross-entropy and of the margin, neither zero nor NaN?"""
    name, y = "vanishing-gradients", subject.labels
    shares: dict[str, float] = {}
    for label, loss in (("ce", cross_entropy), ("margin", margin)):
        zero, nan = 0.0, 0.0
        for x in places(subject):
            gradient = slopes(subject, x, y, loss)
            if gradient is None:
                evidence = "the logits do not depend differentiably on the images: white-box attacks see nothing"
                return judged(name, True, evidence, zero_ce=1, zero_margin=1)
            flat = gradient.flatten(1)
            zero = max(zero, _share((flat == 0).all(dim=1)))
            nan = max(nan, _share(~flat.isfinite().all(dim=1)))
        shares |= {f"zero_{label}": zero, f"nan_{label}": nan}
    most = max(shares["nan_ce"], shares["nan_margin"])
    evidence = (
        f"no gradient for {shares['zero_ce']:.0%} of the images in cross-entropy and {shares['zero_margin']:.0%} in "
        f"the margin, NaN for {most:.0%}, at the images or at random points of their balls, whichever is worse"
    )
    return judged(name, most > 0 or max(shares["zero_ce"], shares["zero_margin"]) > VANISHED, evidence, **shares)


def agreement(subject: CheckContext) -> Check:
    """Do gradients tell how the margin changes? Finite differences along random directions say."""
    name, draws, errors = "gradient-agreement", subject.draws("gradient-agreement"), []
    if torch.finfo(subject.images.dtype).eps > COARSE:
        return skipped(name, f"{subject.images.dtype} is too coarse for finite differences")
    for place in places(subject):
        x = place.clamp(STEP, 1 - STEP)
        gradient = slopes(subject, x, subject.labels, margin)
        if gradient is None:
            return skipped(name, "there are no gradients")
        errors.append(_disagreement(subject, x, gradient.nan_to_num(0, 0, 0), draws))
    here, around = errors
    evidence = (
        f"slopes from gradients and from finite differences differ by {here:.2g} at the images and {around:.2g} at "
        "random points of their balls (squared, relative) for the worst 15 % of them"
    )
    return judged(name, max(errors) > DISAGREES, evidence, error=here, error_around=around)


def _disagreement(subject: CheckContext, x: Tensor, gradient: Tensor, draws: torch.Generator) -> float:
    """Squared error of the slopes that gradients tell, over the squared slopes: what the worst images reach."""
    told, seen = [], []
    for _ in range(DIRECTIONS):
        u = (2 * torch.randint(0, 2, x.shape, generator=draws) - 1).to(x)
        told.append((gradient * u).flatten(1).sum(dim=1).double())
        with torch.no_grad():
            ahead, behind = (margin(subject.white(x + s * STEP * u), subject.labels).double() for s in (1, -1))
        seen.append((ahead - behind) / (2 * STEP))
    told_all, seen_all = torch.stack(told), torch.stack(seen)  # directions, images
    error = (told_all - seen_all).square().sum(dim=0)
    size = torch.maximum(told_all.square().sum(dim=0), seen_all.square().sum(dim=0))
    relative = torch.where(size > 0, error / size.clamp_min(1e-300), torch.ones_like(size))
    return float(relative.nan_to_num(1).quantile(1 - WORST))


def stability(subject: CheckContext) -> Check:
    """Do gradients point the same way one grey level further?"""
    name, draws, cosines = "gradient-stability", subject.draws("gradient-stability"), []
    for x in places(subject):
        noise = (2 * torch.rand(x.shape, generator=draws) - 1).to(x) / 255
        pair = [slopes(subject, at, subject.labels, margin) for at in (x, (x + noise).clamp(0, 1))]
        if pair[0] is None or pair[1] is None:
            return skipped(name, "there are no gradients")
        here, there = (gradient.flatten(1).nan_to_num(0, 0, 0) for gradient in pair if gradient is not None)
        cosines.append(float(torch.cosine_similarity(here, there, dim=1).quantile(WORST)))
    evidence = (
        f"gradients one grey level apart have a cosine of {cosines[0]:.2f} at the images and {cosines[1]:.2f} at "
        "random points of their balls, at most, for the worst 15 % of them"
    )
    return judged(name, min(cosines) < TURNS, evidence, cosine=cosines[0], cosine_around=cosines[1])


def places(subject: CheckContext) -> tuple[Tensor, Tensor]:
    """The images, and a random point of each one's smallest ball: some defences hide only what is no real image."""
    x = subject.images
    delta = lp_ball(subject.norm).sample(x, subject.radii[0], subject.draws("places"))
    return x, (x + delta).clamp(0, 1)


def ruggedness(subject: CheckContext, findings: Findings) -> Check:
    """Do gradients around the images that stand point the same way all over a ball?"""
    name, standing = "rugged-loss", torch.nonzero(findings.standing).flatten()
    if len(standing) < FEW:
        return skipped(name, f"{len(standing)} images stand")
    x, y = subject.at(standing[:LOOKED_AT])
    share = 1.0 if subject.norm == "linf" else x[0].numel() ** -0.5
    apart, draws, directions = min(FURTHEST, subject.radii[-1] * share), subject.draws(name), []
    for _ in range(POINTS):
        moved = x + apart * (2 * torch.rand(x.shape, generator=draws) - 1).to(x)
        moved = 1 - (1 - moved.abs()).abs()  # reflected into [0, 1]: a clamp would leave many pixels at its bounds
        gradient = slopes(subject, moved, y, margin)
        if gradient is None:
            return skipped(name, "there are no gradients")
        directions.append(F.normalize(gradient.flatten(1).nan_to_num(0, 0, 0), dim=1))
    length = torch.stack(directions).sum(dim=0).square().sum(dim=1)  # POINTS where all agree in direction, squared
    typical = float(((length - POINTS) / (POINTS * (POINTS - 1))).median())
    evidence = (
        f"around {len(x)} images that stand, gradients at random points up to {apart:.2g} per pixel away have a mean "
        f"cosine of {typical:.2f} (median)"
    )
    return judged(name, typical < RUGGED, evidence, median_cosine=typical, distance=apart)


def slopes(subject: CheckContext, images: Tensor, labels: Tensor, loss: LossFunction) -> Tensor | None:
    """Gradient of a loss for each image, N×C×H×W; None where logits do not depend on images differentiably."""
    x = images.clone().requires_grad_()
    with torch.enable_grad():
        total = loss(subject.white(x), labels).sum()
    if not total.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(total, x, allow_unused=True)
    return torch.zeros_like(x) if gradient is None else gradient


def _share(mask: Tensor) -> float:
    return float(mask.float().mean())
