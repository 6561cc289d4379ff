"""Checks of what the classifier answers: the same each time, for each batch, in logits."""

from __future__ import annotations

import torch
from torch import Tensor

from robustfpd.attacks.norms import lp_ball
from robustfpd.evaluation.checks.context import CheckContext, judged, passed
from robustfpd.evaluation.verdict import Check

RANDOM = "randomised-outputs"
SAME = 1e-3
"""Logits that differ by less than this, of their spread, are the same: what rounding does in large batches."""
DRAWS = 3
"""Random points of each ball at which answers must be finite."""
SATURATED = 0.2
"""Share of logits at a common bound from which gradients are hidden."""


@torch.no_grad()
def randomised(subject: CheckContext) -> Check:
    """Are answers to the same question the same?"""
    answers = torch.stack([subject.classifier(subject.images).float() for _ in range(5)])
    scale = _spread(answers[0])
    apart = float((answers - answers[0]).abs().amax()) / scale
    turned = int((answers.argmax(dim=2) != answers[0].argmax(dim=1)).any(dim=0).sum())
    evidence = (
        f"asked 5 times, {turned} of {len(subject.images)} predictions changed, logits by {_percent(apart)} of their "
        "spread"
    )
    bad = apart > SAME
    more = "; attacks must average over its draws, and one prediction is not the classifier's" if bad else ""
    return judged(RANDOM, bad, evidence + more, changed=turned, largest_difference=apart)


@torch.no_grad()
def finite(subject: CheckContext) -> Check:
    """Are there finite answers all over the balls? NaN is no class, and no attack learns from it."""
    x, draws, space = subject.images, subject.draws("finite-outputs"), lp_ball(subject.norm)
    bad = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for eps in subject.radii:
        for _ in range(DRAWS):
            near = (x + space.sample(x, eps, draws)).clamp(0, 1)
            bad |= ~subject.classifier(near).isfinite().all(dim=1)
    count = int(bad.sum())
    evidence = f"NaN or infinite logits at random points of the balls around {count} of {len(x)} images"
    more = "; attacks cannot go there, which is no defence: decide what such an answer means" if count else ""
    return judged("finite-outputs", count > 0, evidence + more, images=count)


@torch.no_grad()
def squashed(subject: CheckContext) -> Check:
    """Are these logits, or probabilities or saturated squashings of them?"""
    logits = subject.classifier(subject.images).float()
    sums = logits.sum(dim=1)
    probabilities = float(logits.min()) >= 0 and bool((sums - 1).abs().max() < 1e-3)
    bound = logits.abs().max()
    at_bound = float((logits.abs() >= bound * (1 - 1e-3)).float().mean())
    values = {"saturated": at_bound, "bound": float(bound), "classes": float(logits.shape[1])}
    if probabilities:
        evidence = f"each row of outputs is a distribution (largest {float(bound):.4g}): attack the logits instead"
        return judged("squashed-outputs", True, evidence, **values)
    evidence = f"{_percent(at_bound)} of the outputs lie at their common bound {float(bound):.4g}"
    if at_bound <= SATURATED:
        return passed("squashed-outputs", evidence, **values)
    if subject.squashed:
        return passed("squashed-outputs", f"{evidence}; the logits before squashing were attacked too", **values)
    return judged("squashed-outputs", True, f"{evidence}: a squashing hides gradients there", **values)


@torch.no_grad()
def batches(subject: CheckContext) -> Check:
    """Does an answer depend on which images are in the batch?"""
    x = subject.images
    together = subject.classifier(x).float()
    alone = torch.cat([subject.classifier(one).float() for one in torch.split(x, 1)])
    order = torch.randperm(len(x), generator=subject.draws("batches")).to(x.device)
    shuffled = torch.empty_like(together)
    shuffled[order] = subject.classifier(x[order]).float()
    scale = _spread(together)
    apart = max(float((other - together).abs().max()) for other in (alone, shuffled)) / scale
    turned = int(((alone.argmax(1) != together.argmax(1)) | (shuffled.argmax(1) != together.argmax(1))).sum())
    evidence = (
        f"alone or in another order, {turned} of {len(x)} predictions changed, logits by {_percent(apart)} of their "
        "spread"
    )
    return judged("batch-composition", apart > 10 * SAME, evidence, changed=turned, largest_difference=apart)


def wrappers(subject: CheckContext) -> Check:
    """Do the views under attack classify as the classifier does, with gradients recorded too?"""
    x, y = subject.images, subject.labels
    worst, which = 0, ""
    for name, view in subject.runner.views.items():
        if view.surrogate:
            continue
        with torch.no_grad():
            differing = view.module(x).argmax(dim=1) != y
        with torch.enable_grad():  # a defence may behave while it is attacked, and otherwise when it is judged
            differing |= view.module(x.clone().requires_grad_()).argmax(dim=1) != y
        if int(differing.sum()) > worst:
            worst, which = int(differing.sum()), name
    evidence = (
        f"of {len(x)} correctly classified images, the wrappers under attack classify {len(x) - worst} correctly, "
        "gradients recorded or not"
    )
    return judged("wrapper-accuracy", worst > 0, evidence + (f" ({which})" if which else ""), differing=worst)


def _spread(logits: Tensor) -> float:
    """Standard deviation of the logits of one image, over the images; never zero."""
    return float(logits.std(dim=1).mean().clamp_min(1e-12))


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
