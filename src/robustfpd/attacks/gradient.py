"""White-box gradient attacks: FGSM, BIM and PGD, one loop in three geometries.

Goodfellow et al., ICLR 2015 (FGSM); Kurakin et al., 2017 (BIM); Madry et al., ICLR 2018 (PGD).

Every iterate is projected first and differentiated there: a clamp inside the differentiated function has
zero gradient wherever a pixel sits at 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robustfpd.attacks.attack import attack
from robustfpd.attacks.inputs import check_logits
from robustfpd.attacks.losses import Loss, LossFunction, loss_function
from robustfpd.attacks.norms import Geometry, geometry
from robustfpd.config import Norm
from robustfpd.errors import InputError


@attack("fgsm")
def fgsm(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", loss: Loss = "ce",
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Fast gradient sign method: one step of size eps, no random start; weak in L1, where one dense step spreads thin.

    Arguments, result and errors as in `pgd`; `generator` is not used.
    """
    return pgd(
        classifier, images, labels, eps=eps, norm=norm, steps=1, step_size=eps, random_start=False, loss=loss,
        generator=generator,
    )  # fmt: skip


@attack("bim")
def bim(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 10,
    step_size: float | None = None, loss: Loss = "ce", generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Basic iterative method: PGD from the image itself, in steps of eps/steps (in L1 as much longer as in `pgd`).

    Arguments, result and errors as in `pgd`; `generator` is not used.
    """
    stride = geometry(norm).stride(images[0].numel())
    size = eps / max(steps, 1) * stride if step_size is None else step_size
    return pgd(
        classifier, images, labels, eps=eps, norm=norm, steps=steps, step_size=size, random_start=False, loss=loss,
        generator=generator,
    )  # fmt: skip


@attack("pgd")
def pgd(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 40,
    step_size: float | None = None, restarts: int = 1, random_start: bool = True, loss: Loss = "ce",
    early_stop: bool = False,     generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Projected gradient descent, untargeted.

    The classifier is attacked in evaluation mode; its modes, parameters, gradients and statistics are left
    as they were.

    Args:
        classifier: images N×C×H×W in [0, 1] → logits N×K.
        images: N×C×H×W in [0, 1].
        labels: N, the true classes (or the model's own predictions).
        eps: radius of the ball, in pixels of [0, 1] (8/255, not 8).
        norm: `linf`, `l2` or `l1`.
        steps: gradient steps per start.
        step_size: length of every step in `norm`; None starts at eps (in L1 at 4·√d·eps for d pixels) and
            falls to zero along half a cosine, which finds more than any constant length.
        restarts: starts per image; an image that has fallen is not attacked again.
        random_start: start from a random point of the ball instead of the image.
        loss: `ce` (cross-entropy), `margin` (largest wrong logit minus the true one), `dlr` (the margin in units that
            follow the logits' scale), or a function of logits N×K and labels N that gives N.
        early_stop: give an image up as soon as an iterate is misclassified; costs fewer passes, and returns that
            iterate.
        generator: source of random starts; None takes a fresh one with seed 0.

    Returns:
        N×C×H×W in ball ∩ [0, 1]: per image, of all iterates, a misclassified one with the largest loss,
        or where none was found the one with the largest loss.

    Raises:
        InputError: images outside [0, 1] or with NaN, labels outside the classes, an unknown norm, …
    """
    space = geometry(norm)
    objective = loss_function(loss)
    if steps < 1 or restarts < 1:
        raise InputError(f"steps and restarts must be at least 1, found steps={steps}, restarts={restarts}")
    if step_size is None:
        longest = eps * space.stride(images[0].numel())
        sizes = [longest * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    elif math.isfinite(step_size) and step_size > 0:
        sizes = [step_size] * steps
    else:
        raise InputError(f"step_size must be a positive number, found {step_size!r}")
    assert generator is not None  # the decorator's

    best, standing = images.clone(), torch.arange(len(images), device=images.device)
    best_loss = torch.full((len(images),), -torch.inf, device=images.device)
    for _ in range(restarts):
        x, y = images[standing], labels[standing]
        delta = space.sample(x, eps, generator) if random_start else torch.zeros_like(x)
        found = _ascend(classifier, x, y, delta, eps, space, sizes, objective, early_stop)
        gained = found.fooled | (found.loss > best_loss[standing])
        best[standing[gained]] = found.images[gained]
        best_loss[standing] = torch.maximum(best_loss[standing], found.loss)
        standing = standing[~found.fooled]
        if len(standing) == 0:
            break
    return best


class _Best:
    """The best iterate so far of each image: misclassified before not, then by loss."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.clone()
        self.loss = torch.full((len(images),), -torch.inf, device=images.device)
        self.fooled = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def update(self, rows: Tensor, images: Tensor, logits: Tensor, loss: Tensor, labels: Tensor) -> None:
        """Note iterates of the images at `rows`."""
        fooled = (logits.argmax(dim=1) != labels) & logits.isfinite().all(dim=1)
        known = self.fooled[rows]
        better = (fooled & ~known) | ((fooled == known) & (loss > self.loss[rows]))
        self.images[rows[better]] = images[better]
        self.loss[rows[better]] = loss[better]
        self.fooled[rows] |= fooled


def _ascend(
    classifier: nn.Module, images: Tensor, labels: Tensor, delta: Tensor, eps: float, space: Geometry,
    sizes: Sequence[float], loss: LossFunction, early_stop: bool,
) -> _Best:  # fmt: skip
    """Run projected steps of the given sizes from `delta`; one forward pass more than there are steps."""
    best, rows = _Best(images), torch.arange(len(images), device=images.device)
    for step in range(len(sizes) + 1):
        x = (images + delta).clamp(0, 1).detach()
        last = step == len(sizes)
        with torch.set_grad_enabled(not last):
            x.requires_grad_(not last)
            logits = classifier(x)
            if step == 0:
                check_logits(logits, labels)
            losses = loss(logits, labels)
            total = losses.sum()
        best.update(rows, x.detach(), logits.detach(), losses.detach().float(), labels)
        if last:
            break
        if not total.requires_grad:
            raise InputError(
                "the classifier's logits do not depend differentiably on the images; use a black-box attack"
            )
        (gradient,) = torch.autograd.grad(total, x)
        # A NaN would wander into the images; the point stays where it is instead.
        delta = delta + sizes[step] * space.ascent(gradient.nan_to_num(0, 0, 0))
        delta = space.project(delta, images, eps)
        if early_stop:
            left = ~best.fooled[rows]
            rows, images, labels, delta = rows[left], images[left], labels[left], delta[left]
            if len(rows) == 0:
                break
    return best
