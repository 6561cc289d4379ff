"""White-box gradient attacks: FGSM, BIM and PGD, one loop in three geometries.

Goodfellow et al., ICLR 2015 (FGSM); Kurakin et al., 2017 (BIM); Madry et al., ICLR 2018 (PGD).

Every iterate is projected first and differentiated there: a clamp inside the differentiated function has
zero gradient wherever a pixel sits at 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustfpd.attacks.base import attack
from robustfpd.attacks.batching import BatchState, IterativeAttack, SampleRNG, run
from robustfpd.attacks.inputs import check_batch_size, check_logits, check_shape
from robustfpd.attacks.losses import Loss, LossFunction, loss_function
from robustfpd.attacks.norms import LpBall, lp_ball
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
    stride = lp_ball(norm).step_scale(images[0].numel())
    size = eps / max(steps, 1) * stride if step_size is None else step_size
    return pgd(
        classifier, images, labels, eps=eps, norm=norm, steps=steps, step_size=size, random_start=False, loss=loss,
        generator=generator,
    )  # fmt: skip


@attack("pgd")
def pgd(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 40,
    step_size: float | None = None, restarts: int = 1, random_start: bool = True, loss: Loss = "ce",
    early_stop: bool = False, batch_size: int | None = None,
    generator: torch.Generator | None = None,
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
        restarts: starts per image; an image that has misclassified is not attacked again.
        random_start: start from a random point of the ball instead of the image.
        loss: `ce` (cross-entropy), `margin` (largest wrong logit minus the true one), `dlr` (the margin in units that
            follow the logits' scale), or a function of logits N×K and labels N that gives N.
        early_stop: give an image up as soon as an iterate is misclassified; costs fewer passes, and returns that
            iterate.
        batch_size: images that go through the classifier at once; as images fall or finish, waiting ones take their
            places. None takes all. It changes results by rounding only.
        generator: source of random starts; None takes a fresh one with seed 0.

    Returns:
        N×C×H×W in ball ∩ [0, 1]: per image, of all iterates, a misclassified one with the largest loss,
        or where none was found the one with the largest loss.

    Raises:
        InputError: images outside [0, 1] or with NaN, labels outside the classes, an unknown norm, …
    """
    space = lp_ball(norm)
    objective = loss_function(loss)
    if steps < 1 or restarts < 1:
        raise InputError(f"steps and restarts must be at least 1, found steps={steps}, restarts={restarts}")
    if step_size is None:
        longest = eps * space.step_scale(images[0].numel())
        sizes = [longest * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    elif math.isfinite(step_size) and step_size > 0:
        sizes = [step_size] * steps
    else:
        raise InputError(f"step_size must be a positive number, found {step_size!r}")
    check_batch_size(batch_size)
    assert generator is not None  # the decorator's
    rng = SampleRNG(generator) if random_start else None
    ascent = PGD(classifier, images, labels, eps, space, sizes, objective, rng, early_stop)
    run(ascent, torch.arange(len(images), device=images.device), restarts, batch_size)
    return ascent.found


@dataclass
class PGDState(BatchState):
    """Images on their way up."""

    images: Tensor
    labels: Tensor
    x: Tensor
    """Where each is, in ball and box."""
    best: Tensor
    """Of its iterates the best: misclassified before not, then by loss."""
    best_loss: Tensor


class PGD(IterativeAttack[PGDState]):
    """Projected steps of given sizes; one forward pass more than there are steps."""

    def __init__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, eps: float, space: LpBall,
        sizes: Sequence[float], loss: LossFunction, rng: SampleRNG | None, early: bool,
    ) -> None:  # fmt: skip
        self.classifier, self.images, self.labels, self.eps, self.space = classifier, images, labels, eps, space
        self.loss, self.rng, self.early, self.length = loss, rng, early, len(sizes) + 1
        self.sizes = [*sizes, 0.0]
        self.table = torch.tensor(self.sizes, device=images.device, dtype=images.dtype)
        self.found = images.clone()
        self.found_loss = torch.full((len(images),), -torch.inf, device=images.device)

    def begin(self, image: Tensor, start: Sequence[int]) -> PGDState:
        """From a random point of the ball, or the image itself."""
        images = self.images[image]
        x = images.clone()
        if self.rng is not None:
            x = x.add_(self.space.sample(images, self.eps, self.rng.of(image, start))).clamp_(0, 1)
        return PGDState(
            image=image, step=torch.zeros_like(image), misclassified=torch.zeros_like(image, dtype=torch.bool),
            images=images, labels=self.labels[image], x=x, best=x.clone(),
            best_loss=torch.full_like(self.found_loss[image], -torch.inf),
        )  # fmt: skip

    def look(self, rows: PGDState, at: int | None, fresh: Tensor | None) -> None:
        """One step, or the last look."""
        last = at == self.length - 1
        x = rows.x.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            logits = self.classifier(x)
            if fresh is not None:
                _check_fresh(logits, rows.labels, fresh)
            losses = self.loss(logits, rows.labels)
            total = losses.sum()
        with torch.no_grad():
            self._note(rows, logits.detach(), losses.detach().float())
        if last:
            return
        if not total.requires_grad:
            raise InputError(
                "the classifier's logits do not depend differentiably on the images; use a black-box attack"
            )
        (gradient,) = torch.autograd.grad(total, x)
        size = self.table[rows.step].reshape(-1, 1, 1, 1) if at is None else self.sizes[at]
        with torch.no_grad():
            self.space.step(rows.x, gradient, size, rows.images, self.eps)

    def _note(self, rows: PGDState, logits: Tensor, loss: Tensor) -> None:
        misclassified = (logits.argmax(dim=1) != rows.labels) & logits.isfinite().all(dim=1)
        better = (misclassified == rows.misclassified) & (loss > rows.best_loss)
        if self.early:
            better &= ~rows.misclassified
        better |= misclassified & ~rows.misclassified
        torch.where(better.reshape(-1, 1, 1, 1), rows.x, rows.best, out=rows.best)
        torch.where(better, loss, rows.best_loss, out=rows.best_loss)
        rows.misclassified |= misclassified

    def end(self, rows: PGDState, places: Tensor) -> None:
        """Keep what is better than what an earlier start found."""
        image, misclassified, loss = rows.image[places], rows.misclassified[places], rows.best_loss[places]
        before = self.found_loss[image]
        gained = (misclassified | (loss > before)).reshape(-1, 1, 1, 1)
        self.found[image] = torch.where(gained, rows.best[places], self.found[image])
        self.found_loss[image] = torch.maximum(loss, before)


def _check_fresh(logits: Tensor, labels: Tensor, fresh: Tensor) -> None:
    """Refuse a classifier whose answers at the start are none."""
    if len(fresh) == len(labels):
        check_logits(logits, labels)
    else:
        check_logits(check_shape(logits, labels)[fresh], labels[fresh])
