"""Auto-PGD: steps whose length follows the loss, without a step size to choose.

Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
ICML 2020, algorithm 1 (L∞, L2); Croce & Hein, "Mind the box", ICML 2021, section 4 (L1).

An image leaves the batch as soon as it is misclassified: what follows costs passes and adds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from robustfpd.attacks.attack import attack
from robustfpd.attacks.inputs import check_logits
from robustfpd.attacks.losses import loss_function, targeted_dlr
from robustfpd.attacks.norms import geometry
from robustfpd.config import Norm
from robustfpd.errors import InputError

TARGETS = 9
"""Wrong classes that the targeted attack tries, likeliest first, as AutoAttack does."""
INERTIA = 0.25
"""Share of the last step that each step keeps, in L∞ and L2."""
RISING = 0.75
"""Share of a window's steps that must raise the loss, or steps are halved."""
SHRINKING = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
"""In L1 the ball shrinks: its radius over eps, and the share of the steps spent at it."""

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits N×K, labels N, targets N → N."""


@attack("apgd-ce")
def apgd_ce(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 100,
    restarts: int = 1, eot: int = 1, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Auto-PGD on cross-entropy.

    Arguments and errors as in `pgd`; `eot` is how often a random classifier is asked at each step, its gradients being
    averaged (Athalye et al., ICML 2018). Returns the first misclassified iterate, or where there is none the one with
    the largest loss.
    """
    return _Search(classifier, eps, norm, steps, eot, _untargeted("ce"), generator).all(images, labels, restarts)


@attack("apgd-dlr")
def apgd_dlr(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 100,
    restarts: int = 1, eot: int = 1, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Auto-PGD on the difference of logits ratio, which scaled logits cannot hide from; as `apgd_ce` otherwise."""
    return _Search(classifier, eps, norm, steps, eot, _untargeted("dlr"), generator).all(images, labels, restarts)


@attack("apgd-t")
def apgd_t(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 100,
    restarts: int = 1, eot: int = 1, targets: int = TARGETS, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Auto-PGD on the targeted DLR loss, towards the `targets` likeliest wrong classes in turn.

    As `apgd_ce` otherwise; at most K-1 classes are tried, and any misclassification counts.
    """
    search = _Search(classifier, eps, norm, steps, eot, targeted_dlr, generator)
    return search.all(images, labels, restarts, targets)


def _untargeted(loss: str) -> Objective:
    function = loss_function(loss)  # type: ignore[arg-type]  # one of our own names
    return lambda logits, labels, targets: function(logits, labels)


@dataclass
class _State:
    """What is known of each image that still stands; every field has a row per image."""

    place: Tensor
    images: Tensor
    labels: Tensor
    targets: Tensor
    x: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    best_x: Tensor
    best_gradient: Tensor
    best_loss: Tensor
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

    def keep(self, rows: Tensor) -> None:
        """Drop the images outside `rows`, a mask."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])


class _Search:
    """Runs of Auto-PGD against one classifier, on images that still stand."""

    def __init__(
        self, classifier: nn.Module, eps: float, norm: Norm, steps: int, eot: int, objective: Objective,
        generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        assert generator is not None  # the decorator's
        self.classifier, self.eps, self.space, self.steps = classifier, eps, geometry(norm), steps
        self.eot, self.objective, self.generator = eot, objective, generator
        self.sparse = norm == "l1"

    def all(self, images: Tensor, labels: Tensor, restarts: int, targets: int | None = None) -> Tensor:
        """Attack from `restarts` starts, towards each of the likeliest classes where `targets` says how many."""
        for name, count in (("steps", self.steps), ("restarts", restarts), ("eot", self.eot), ("targets", targets)):
            if count is not None and count < 1:
                raise InputError(f"{name} must be at least 1, found {count}")
        with torch.no_grad():
            logits = check_logits(self.classifier(images), labels)
        goals = logits.scatter(1, labels.unsqueeze(1), -torch.inf).argsort(dim=1, descending=True)
        self.found, self.found_loss = images.clone(), torch.full_like(logits[:, 0].float(), -torch.inf)
        self.standing = logits.argmax(dim=1) == labels
        for rank in range(min(targets or 1, logits.shape[1] - 1)):
            for _ in range(restarts):
                if bool(self.standing.any()):
                    self._run(images, labels, goals[:, rank])
        return self.found

    def _run(self, images: Tensor, labels: Tensor, targets: Tensor) -> None:
        """One start of every image that stands."""
        place = self.standing.nonzero().flatten()
        x, y, t = images[place], labels[place], targets[place]
        first = self.eps * (SHRINKING[0][0] if self.sparse else 1)
        start = x + self.space.sample(x, first, self.generator)
        if not self.sparse:
            self._climb(place, x, y, t, start, self.eps, self.steps)
            return
        left = self.steps
        for factor, share in SHRINKING:
            steps = left if factor == SHRINKING[-1][0] else min(left, round(share * self.steps))
            left -= steps
            radius = factor * self.eps
            start = x + self.space.project(start - x, x, radius)
            if steps:
                place, start = self._climb(place, x, y, t, start, radius, steps)
                # Images that fell are gone; the others' rows follow their places.
                x, y, t = images[place], labels[place], targets[place]

    def _climb(
        self, place: Tensor, images: Tensor, labels: Tensor, targets: Tensor, start: Tensor, eps: float, steps: int
    ) -> tuple[Tensor, Tensor]:
        """Raise the objective in the ball of radius `eps`; return which images still stand, and their best points."""
        s = self._begin(place, images, labels, targets, start, eps)
        window = since = max(int((0.04 if self.sparse else 0.22) * steps), 1)
        for step in range(steps):
            if len(s.place) == 0:
                break
            x = self._sparse_step(s, eps) if self.sparse else self._step(s, eps, first=step == 0)
            s.previous, s.x = s.x, x
            before = s.loss
            fooled = self._look(s)
            s.risen += s.loss > before
            better = s.loss > s.best_loss
            s.best_x = torch.where(_column(better), s.x, s.best_x)
            s.best_gradient = torch.where(_column(better), s.gradient, s.best_gradient)
            s.best_loss = torch.where(better, s.loss, s.best_loss)
            self._note(s, fooled, eps)
            since -= 1
            if since == 0:
                if self.sparse:
                    self._resize_sparse(s, eps)
                else:
                    self._resize(s, window)
                    window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
                since = window
        return s.place, s.best_x

    def _begin(
        self, place: Tensor, images: Tensor, labels: Tensor, targets: Tensor, start: Tensor, eps: float
    ) -> _State:
        zero, pixels = torch.zeros(len(place), device=images.device), images[0].numel()
        changed = (start - images).flatten(1).ne(0).sum(dim=1).float()
        first = eps == SHRINKING[0][0] * self.eps
        s = _State(
            place=place, images=images, labels=labels, targets=targets, x=start, previous=start,
            gradient=torch.zeros_like(start), loss=zero - torch.inf, best_x=start, best_gradient=start,
            best_loss=zero - torch.inf, size=zero + eps * (1 if self.sparse else 2), risen=zero.clone(),
            checked_loss=zero - torch.inf, shortened=torch.ones_like(zero, dtype=torch.bool),
            dense=zero + 0.2 if first else changed / pixels / 1.5, moved=zero + pixels if first else changed,
        )  # fmt: skip
        fooled = self._look(s)
        s.best_loss, s.best_gradient, s.checked_loss = s.loss.clone(), s.gradient.clone(), s.loss.clone()
        self._note(s, fooled, eps)
        return s

    def _look(self, s: _State) -> Tensor:
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
        s.gradient, s.loss = gradient, value.nan_to_num(-torch.inf, neginf=-torch.inf, posinf=torch.inf)
        return (answer.argmax(dim=1) != s.labels) & answer.isfinite().all(dim=1)

    def _note(self, s: _State, fooled: Tensor, eps: float) -> None:
        """Keep what was found in the ball that was asked for, and let the fallen go."""
        if eps > self.eps:  # points of a wider ball do not count yet
            return
        place, gained = s.place, fooled | (s.loss > self.found_loss[s.place])
        self.found[place[gained]] = s.x.detach()[gained]
        self.found_loss[place[gained]] = s.loss[gained]
        self.standing[place[fooled]] = False
        if bool(fooled.any()):
            s.keep(~fooled)

    def _step(self, s: _State, eps: float, *, first: bool) -> Tensor:
        """A projected step with inertia."""
        ahead = self.space.project(
            s.x + _column(s.size) * self.space.ascent(s.gradient) - s.images, s.images, eps
        )  # fmt: skip
        keep = 0.0 if first else INERTIA
        moved = (1 - keep) * (s.images + ahead - s.x) + keep * (s.x - s.previous)
        delta = (s.x + moved - s.images).to(s.images.dtype)
        return (s.images + self.space.project(delta, s.images, eps)).clamp(0, 1)

    def _resize(self, s: _State, window: int) -> None:
        """Halve the steps of images whose loss rises too seldom, and return them to their best points."""
        stuck = (s.risen <= RISING * window) | (~s.shortened & (s.best_loss <= s.checked_loss))
        s.size = torch.where(stuck, s.size / 2, s.size)
        s.x = torch.where(_column(stuck), s.best_x, s.x)
        s.gradient = torch.where(_column(stuck), s.best_gradient, s.gradient)
        s.shortened, s.checked_loss = stuck, s.best_loss.clone()
        s.risen = torch.zeros_like(s.risen)

    def _sparse_step(self, s: _State, eps: float) -> Tensor:
        """A step in equal parts along the pixels with the steepest slopes."""
        slopes = s.gradient.flatten(1).abs()
        pixels = slopes.shape[1]
        rank = ((1 - s.dense) * pixels).clamp(0, pixels - 1).long()
        least = slopes.sort(dim=1).values.gather(1, rank.unsqueeze(1))
        direction = torch.where(slopes >= least, s.gradient.flatten(1).sign(), 0.0).reshape_as(s.gradient)
        share = direction.flatten(1).abs().sum(dim=1).clamp_min(1)
        delta = (s.x + direction * _column(s.size / share) - s.images).to(s.images.dtype)
        return (s.images + self.space.project(delta, s.images, eps)).clamp(0, 1)

    def _resize_sparse(self, s: _State, eps: float) -> None:
        """Follow the sparsity of the best point: longest steps where it grew sparser, shorter ones elsewhere."""
        changed = (s.best_x - s.images).flatten(1).ne(0).sum(dim=1).float()
        sparser = changed / s.moved < 0.95
        s.dense = changed / s.images.shape[1:].numel() / 1.5
        s.size = torch.where(sparser, torch.full_like(s.size, eps), s.size / 1.5).clamp(eps / 10, eps)
        s.x = torch.where(_column(sparser), s.best_x, s.x)
        s.gradient = torch.where(_column(sparser), s.best_gradient, s.gradient)
        s.moved = changed.clamp_min(1)


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)  # N 1 1 1
