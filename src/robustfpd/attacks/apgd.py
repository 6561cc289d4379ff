"""Auto-PGD: steps whose length follows the loss, without a step size to choose.

Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
ICML 2020, algorithm 1 (L∞, L2); Croce & Hein, "Mind the box", ICML 2021, section 4 (L1).

An image leaves the batch as soon as it is misclassified: what follows costs passes and adds nothing. The schedule of a
start, one entry for each pass, is in `apgd_schedule`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustfpd.attacks.apgd_schedule import SHRINKING, Due, Schedule
from robustfpd.attacks.base import attack
from robustfpd.attacks.batching import BatchState, IterativeAttack, SampleRNG, run
from robustfpd.attacks.inputs import check_batch_size, check_logits
from robustfpd.attacks.losses import loss_function, targeted_dlr
from robustfpd.attacks.norms import Radius, lp_ball
from robustfpd.config import Norm
from robustfpd.errors import InputError

TARGETS = 9
"""Wrong classes that the targeted attack tries, likeliest first, as AutoAttack does."""
INERTIA = 0.25
"""Share of the last step that each step keeps, in L∞ and L2."""
RISING = 0.75
"""Share of a window's steps that must raise the loss, or steps are halved."""
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits N×K, labels N, targets N → N."""


@attack("apgd-ce")
def apgd_ce(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 100,
    restarts: int = 1, eot: int = 1, batch_size: int | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Auto-PGD on cross-entropy.

    Arguments and errors as in `pgd`; `eot` is how often a random classifier is asked at each step, its gradients being
    averaged (Athalye et al., ICML 2018). Returns the first misclassified iterate, or where there is none the one with
    the largest loss.
    """
    search = APGD(classifier, images, labels, eps, norm, steps, eot, _untargeted("ce"), generator)
    return search.all(restarts, batch_size)


@attack("apgd-dlr")
def apgd_dlr(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 100,
    restarts: int = 1, eot: int = 1, batch_size: int | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Auto-PGD on the difference of logits ratio, which scaled logits cannot hide from; as `apgd_ce` otherwise."""
    search = APGD(classifier, images, labels, eps, norm, steps, eot, _untargeted("dlr"), generator)
    return search.all(restarts, batch_size)


@attack("apgd-t")
def apgd_t(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 100,
    restarts: int = 1, eot: int = 1, targets: int = TARGETS, batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Auto-PGD on the targeted DLR loss, towards the `targets` likeliest wrong classes in turn.

    As `apgd_ce` otherwise; at most K-1 classes are tried, and any misclassification counts.
    """
    search = APGD(classifier, images, labels, eps, norm, steps, eot, targeted_dlr, generator)
    return search.all(restarts, batch_size, targets)


def _untargeted(loss: str) -> Objective:
    function = loss_function(loss)  # type: ignore[arg-type]  # one of our own names
    return lambda logits, labels, targets: function(logits, labels)


@dataclass
class APGDState(BatchState):
    """What is known of each image that still stands."""

    images: Tensor
    labels: Tensor
    targets: Tensor
    x: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    best_x: Tensor
    """In the ball of this stage the best point, and its gradient and loss."""
    best_gradient: Tensor
    best_loss: Tensor
    found: Tensor
    """In the ball that was asked for the best point, and its loss."""
    found_loss: Tensor
    size: Tensor
    """Length of the next step."""
    risen: Tensor
    """Steps of this window that raised the loss (L∞, L2)."""
    checked_loss: Tensor
    """Best loss at the last check."""
    shortened: Tensor
    """Whether the last check halved the steps."""
    dense: Tensor
    """Share of the pixels that a step moves (L1)."""
    moved: Tensor
    """Pixels that the best point had moved at the last check (L1)."""


class APGD(IterativeAttack[APGDState]):
    """Runs of Auto-PGD against one classifier, on images that still stand."""

    early = True

    def __init__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, eps: float, norm: Norm, steps: int, eot: int,
        objective: Objective, generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        assert generator is not None  # the decorator's
        self.classifier, self.images, self.labels = classifier, images, labels
        self.eps, self.space, self.steps, self.eot = eps, lp_ball(norm), steps, eot
        self.objective, self.generator, self.sparse = objective, generator, norm == "l1"

    def all(self, restarts: int, batch_size: int | None, targets: int | None = None) -> Tensor:
        """Attack from `restarts` starts, towards each of the likeliest classes where `targets` says how many."""
        check_batch_size(batch_size)
        for name, count in (("steps", self.steps), ("restarts", restarts), ("eot", self.eot), ("targets", targets)):
            if count is not None and count < 1:
                raise InputError(f"{name} must be at least 1, found {count}")
        images, labels = self.images, self.labels
        with torch.no_grad():
            parts = torch.split(torch.arange(len(images), device=images.device), batch_size or len(images))
            logits = torch.cat([check_logits(self.classifier(images[part]), labels[part]) for part in parts])
        self.goals = logits.scatter(1, labels.unsqueeze(1), -torch.inf).argsort(dim=1, descending=True)
        self.found, self.found_loss = images.clone(), torch.full_like(logits[:, 0].float(), -torch.inf)
        self.schedule = Schedule(self.steps, self.eps, images.device, sparse=self.sparse)
        self.length, self.restarts, self.rng = len(self.schedule), restarts, SampleRNG(self.generator)
        standing = (logits.argmax(dim=1) == labels).nonzero().flatten()
        run(self, standing, restarts * min(targets or 1, logits.shape[1] - 1), batch_size)
        return self.found

    def begin(self, image: Tensor, start: Sequence[int]) -> APGDState:
        """From a random point of the largest ball."""
        images, none = self.images[image], torch.full_like(self.found_loss[image], -torch.inf)
        widest = self.eps * (SHRINKING[0][0] if self.sparse else 1)
        delta = self.space.sample(images, widest, self.rng.of(image, start))
        radius = self.schedule.first_radius
        x = images + (delta if radius == widest else self.space.project(delta, images, radius))
        rank = torch.tensor(start, device=image.device) // self.restarts
        zero = torch.zeros_like(none)
        return APGDState(
            image=image, step=torch.zeros_like(image), misclassified=zero.bool(), images=images,
            labels=self.labels[image],
            targets=self.goals[image, rank], x=x, previous=x.clone(), gradient=torch.zeros_like(x), loss=none,
            best_x=x.clone(), best_gradient=torch.zeros_like(x), best_loss=none.clone(), found=images.clone(),
            found_loss=none.clone(), size=zero.clone(), risen=zero.clone(), checked_loss=none.clone(),
            shortened=~zero.bool(), dense=zero.clone(), moved=zero.clone(),
        )  # fmt: skip

    def look(self, rows: APGDState, at: int | None, fresh: Tensor | None) -> None:
        """One pass: note what the points now are worth, shorten steps where it is time, and step."""
        s, now, before = rows, self.schedule.at(rows.step), rows.loss
        misclassified = self._ask(s)
        with torch.no_grad():
            self._begin_stage(s, now)
            s.risen = torch.where(now.begins, 0.0, s.risen + (s.loss > before))
            better = now.begins | (s.loss > s.best_loss)
            s.best_x = torch.where(_column(better), s.x, s.best_x)
            s.best_gradient = torch.where(_column(better), s.gradient, s.best_gradient)
            s.best_loss = torch.where(better, s.loss, s.best_loss)
            s.checked_loss = torch.where(now.begins, s.loss, s.checked_loss)
            self._note(s, misclassified & now.counts, now.counts)
            if self.schedule.checks(at):
                (self._resize_sparse if self.sparse else self._resize)(s, now)
            if at != self.length - 1:
                self._move(s, now, at)

    def end(self, rows: APGDState, places: Tensor) -> None:
        """Keep what is better than what earlier starts found."""
        image, misclassified, loss = rows.image[places], rows.misclassified[places], rows.found_loss[places]
        gained = misclassified | (loss > self.found_loss[image])
        self.found[image] = torch.where(_column(gained), rows.found[places], self.found[image])
        self.found_loss[image] = torch.where(gained, loss, self.found_loss[image])

    def _ask(self, s: APGDState) -> Tensor:
        """Loss and gradient at the points now, averaged over `eot` answers; whether these misclassify on average."""
        x = s.x.detach().requires_grad_()
        gradient, answer, value = torch.zeros_like(x), torch.zeros(()), torch.zeros(())
        for _ in range(self.eot):
            with torch.enable_grad():
                logits = self.classifier(x)
                losses = self.objective(logits, s.labels, s.targets)
                total = losses.sum()
            if not total.requires_grad:
                raise InputError(
                    "the classifier's logits do not depend differentiably on the images; use a black-box attack"
                )
            (one,) = torch.autograd.grad(total, x)
            gradient = gradient + one.nan_to_num(0, 0, 0) / self.eot
            answer = answer + logits.detach() / self.eot
            value = value + losses.detach().float() / self.eot
        s.gradient = gradient.detach()
        s.loss = value.nan_to_num(-torch.inf, neginf=-torch.inf, posinf=torch.inf)
        return (answer.argmax(dim=1) != s.labels) & answer.isfinite().all(dim=1)

    def _begin_stage(self, s: APGDState, now: Due) -> None:
        """Steps of full length where this pass is the first in its ball."""
        s.size = torch.where(now.begins, now.radius * (1 if self.sparse else 2), s.size)
        s.shortened = s.shortened | now.begins
        if self.sparse:
            pixels, changed = s.images[0].numel(), _changed(s.x, s.images)
            widest = now.radius > 2.5 * self.eps
            s.dense = torch.where(now.begins, torch.where(widest, 0.2, changed / pixels / 1.5), s.dense)
            s.moved = torch.where(now.begins, torch.where(widest, float(pixels), changed), s.moved)

    def _note(self, s: APGDState, misclassified: Tensor, counts: Tensor) -> None:
        """Keep the first misclassified point, or the one with the largest loss; those of wider balls do not count."""
        gained = ~s.misclassified & counts & (misclassified | (s.loss > s.found_loss))
        s.found = torch.where(_column(gained), s.x, s.found)
        s.found_loss = torch.where(gained, s.loss, s.found_loss)
        s.misclassified = s.misclassified | misclassified

    def _move(self, s: APGDState, now: Due, at: int | None) -> None:
        """The next points: a step further, or the best ones on the way into a smaller ball."""
        x = self._sparse_step(s, _column(now.radius)) if self.sparse else self._step(s, now)
        if self.sparse and self.schedule.ends(at):
            into = self.schedule.at(s.step + 1).radius
            inside = s.images + self.space.project(s.best_x - s.images, s.images, _column(into))
            x = torch.where(_column(now.ends), inside, x)
            s.x = torch.where(_column(now.ends), inside, s.x)
        s.previous, s.x = s.x, x

    def _step(self, s: APGDState, now: Due) -> Tensor:
        """A projected step with inertia."""
        ahead = self.space.project(
            s.x + _column(s.size) * self.space.normalize(s.gradient) - s.images, s.images, self.eps
        )  # fmt: skip
        keep = _column(torch.where(now.begins, 0.0, INERTIA))
        moved = (1 - keep) * (s.images + ahead - s.x) + keep * (s.x - s.previous)
        delta = (s.x + moved - s.images).to(s.images.dtype)
        return (s.images + self.space.project(delta, s.images, self.eps)).clamp(0, 1)

    def _resize(self, s: APGDState, now: Due) -> None:
        """Halve the steps of images whose loss rises too seldom, and return them to their best points."""
        stuck = (s.risen <= RISING * now.window) | (~s.shortened & (s.best_loss <= s.checked_loss))
        stuck &= now.checks
        s.size = torch.where(stuck, s.size / 2, s.size)
        s.x = torch.where(_column(stuck), s.best_x, s.x)
        s.gradient = torch.where(_column(stuck), s.best_gradient, s.gradient)
        s.shortened = torch.where(now.checks, stuck, s.shortened)
        s.checked_loss = torch.where(now.checks, s.best_loss, s.checked_loss)
        s.risen = torch.where(now.checks, 0.0, s.risen)

    def _sparse_step(self, s: APGDState, eps: Radius) -> Tensor:
        """A step in equal parts along the pixels with the steepest slopes."""
        slopes = s.gradient.flatten(1).abs()
        pixels = slopes.shape[1]
        rank = ((1 - s.dense) * pixels).clamp(0, pixels - 1).long()
        least = slopes.sort(dim=1).values.gather(1, rank.unsqueeze(1))
        direction = torch.where(slopes >= least, s.gradient.flatten(1).sign(), 0.0).reshape_as(s.gradient)
        share = direction.flatten(1).abs().sum(dim=1).clamp_min(1)
        delta = (s.x + direction * _column(s.size / share) - s.images).to(s.images.dtype)
        return (s.images + self.space.project(delta, s.images, eps)).clamp(0, 1)

    def _resize_sparse(self, s: APGDState, now: Due) -> None:
        """Follow the sparsity of the best point: longest steps where it grew sparser, shorter ones elsewhere."""
        changed = _changed(s.best_x, s.images)
        sparser = now.checks & (changed / s.moved < 0.95)
        size = torch.where(sparser, now.radius, s.size / 1.5)
        size = torch.minimum(torch.maximum(size, now.radius / 10), now.radius)
        s.size = torch.where(now.checks, size, s.size)
        s.dense = torch.where(now.checks, changed / s.images.shape[1:].numel() / 1.5, s.dense)
        s.x = torch.where(_column(sparser), s.best_x, s.x)
        s.gradient = torch.where(_column(sparser), s.best_gradient, s.gradient)
        s.moved = torch.where(now.checks, changed.clamp_min(1), s.moved)


def _changed(x: Tensor, images: Tensor) -> Tensor:
    """How many pixels differ, N."""
    return (x - images).flatten(1).ne(0).sum(dim=1).float()


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)  # N 1 1 1
