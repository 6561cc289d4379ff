"""Auto-PGD: gradient steps whose length follows the loss, without a step size to choose.

Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
ICML 2020, algorithm 1 (L∞, L2); Croce & Hein, "Mind the box", ICML 2021, section 4 (L1).

An image leaves the batch as soon as it is misclassified: further passes would add nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustfpd.attacks.base import attack, check_batch_size, check_counts, check_differentiable, check_logits
from robustfpd.attacks.batching import BatchState, IterativeAttack, SampleRNG, run
from robustfpd.attacks.losses import cross_entropy, dlr, targeted_dlr
from robustfpd.attacks.norms import Radius, lp_ball, per_image
from robustfpd.config import Norm

MOMENTUM = 0.25
"""Fraction of the last step that each step repeats, in L∞ and L2 (1 - α in the paper)."""
RISING = 0.75
"""Fraction of the steps between two checkpoints that must raise the loss (ρ in the paper)."""
L1_STAGES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
"""In L1 the ball shrinks in stages: its radius over eps, and the fraction of the steps spent in it."""
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Logits N×K, labels N, targets N → losses N."""


@attack("apgd-ce")
def apgd_ce(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 100,
    restarts: int = 1, eot: int = 1, batch_size: int | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Auto-PGD on cross-entropy (Croce & Hein, ICML 2020).

    Arguments and errors as in `pgd`. `eot` is the number of forward passes over which the gradient of a random
    classifier is averaged at each step (expectation over transformation; Athalye et al., ICML 2018). Returns the first
    misclassified iterate, or the one with the largest loss if none is misclassified.
    """
    options = _Options(steps, restarts, eot, batch_size)
    return _apgd(classifier, images, labels, eps, norm, lambda z, y, _: cross_entropy(z, y), options, generator)


@attack("apgd-dlr")
def apgd_dlr(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 100,
    restarts: int = 1, eot: int = 1, batch_size: int | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Auto-PGD on the difference of logits ratio, which the logits' scale does not change; otherwise as `apgd_ce`."""
    options = _Options(steps, restarts, eot, batch_size)
    return _apgd(classifier, images, labels, eps, norm, lambda z, y, _: dlr(z, y), options, generator)


@attack("apgd-t")
def apgd_t(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 100,
    restarts: int = 1, eot: int = 1, targets: int = 9, batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Auto-PGD on the targeted DLR loss, towards each of the `targets` most likely wrong classes; else as `apgd_ce`.

    At most K - 1 classes are targets. Any misclassification counts as success.
    """
    options = _Options(steps, restarts, eot, batch_size, targets)
    return _apgd(classifier, images, labels, eps, norm, targeted_dlr, options, generator)


class _Options(NamedTuple):
    steps: int
    restarts: int
    eot: int
    batch_size: int | None
    targets: int = 1


def _apgd(
    classifier: nn.Module, images: Tensor, labels: Tensor, eps: float, norm: Norm, objective: Objective,
    options: _Options, generator: torch.Generator | None,
) -> Tensor:  # fmt: skip
    """Attack all images that are correctly classified."""
    steps, restarts, eot, batch_size, targets = options
    check_batch_size(batch_size)
    check_counts(steps=steps, restarts=restarts, eot=eot, targets=targets)
    assert generator is not None  # Attack.__call__ sets it
    with torch.no_grad():
        batches = torch.split(torch.arange(len(images), device=images.device), batch_size or len(images))
        logits = torch.cat([check_logits(classifier(images[batch]), labels[batch]) for batch in batches])
    ranking = logits.scatter(1, labels.unsqueeze(1), -torch.inf).argsort(dim=1, descending=True)
    iterations = APGD(
        classifier, images, labels, lp_ball(norm), eps, early_stop=True, objective=objective, eot=eot,
        ranking=ranking, restarts=restarts, schedule=schedule(steps, eps, l1=norm == "l1"), rng=SampleRNG(generator),
    )  # fmt: skip
    correct = (logits.argmax(dim=1) == labels).nonzero().flatten()
    run(iterations, correct, restarts * min(targets, logits.shape[1] - 1), batch_size)
    return iterations.adversarial


class Pass(NamedTuple):
    """The schedule of one pass (numbers), or of one pass of each image (tensors, N)."""

    radius: Any  # of the ball
    first: Any  # the first pass in this ball
    last: Any  # the last pass before the ball shrinks (L1)
    final: Any  # the ball has radius eps: results count
    checkpoint: Any  # the step size is adapted
    window: Any  # steps since the last checkpoint


def schedule(steps: int, eps: float, *, l1: bool) -> list[Pass]:
    """Return the passes of a restart: checkpoints (ICML 2020, section 3.1), in L1 in balls that shrink (ICML 2021)."""
    passes, remaining = [], steps
    for factor, fraction in L1_STAGES if l1 else ((1.0, 1.0),):
        final = factor == 1
        count = remaining if final else min(remaining, round(fraction * steps))
        remaining -= count
        if count == 0:
            continue
        window = until_checkpoint = max(int((0.04 if l1 else 0.22) * count), 1)
        passes.append(Pass(factor * eps, True, False, final, False, 0))  # at the starting point
        for step in range(count):
            until_checkpoint -= 1
            last = not final and step == count - 1
            passes.append(Pass(factor * eps, False, last, final, until_checkpoint == 0, window))
            if until_checkpoint == 0:
                if not l1:
                    window = max(window - max(int(0.03 * count), 1), max(int(0.06 * count), 1))
                until_checkpoint = window
    return passes


@dataclass
class APGDState(BatchState):
    """Iterates with their step sizes."""

    target: Tensor
    previous: Tensor  # the iterate before x
    gradient: Tensor
    loss: Tensor
    best_x: Tensor  # the iterate with the largest loss in the current ball, its gradient and its loss
    best_gradient: Tensor
    best_loss: Tensor
    step_size: Tensor
    rises: Tensor  # steps since the last checkpoint that raised the loss (L∞, L2)
    checkpoint_loss: Tensor  # the largest loss at the last checkpoint
    halved: Tensor  # the step size was halved at the last checkpoint
    density: Tensor  # fraction of the pixels that a step moves (L1)
    changed: Tensor  # pixels changed in the best iterate at the last checkpoint (L1)


@dataclass(eq=False)
class APGD(IterativeAttack[APGDState]):
    """Auto-PGD on correctly classified images."""

    objective: Objective
    eot: int
    ranking: Tensor  # N×K, classes from the most to the least likely wrong one
    restarts: int  # per target
    schedule: list[Pass]
    rng: SampleRNG

    def __post_init__(self) -> None:
        super().__post_init__()
        self.passes, self.l1 = len(self.schedule), self.ball.name == "l1"
        columns = zip(*self.schedule, strict=True)
        self._schedule = Pass(*(torch.tensor(column, device=self.images.device) for column in columns))

    def _at(self, step: Tensor) -> Pass:
        """Return the schedule of images, N, after `step` passes each."""
        step = step.clamp_max(self.passes - 1)
        return Pass(*(column[step] for column in self._schedule))

    def start(self, image: Tensor, restart: Sequence[int]) -> APGDState:
        """Start at a random point of the largest ball."""
        images, radius = self.images[image], self.schedule[0].radius
        largest = self.eps * (L1_STAGES[0][0] if self.l1 else 1)
        delta = self.ball.sample(images, largest, self.rng.generators(image, restart))
        x = images + (delta if radius == largest else self.ball.project(delta, images, radius))
        target = self.ranking[image, torch.tensor(restart, device=image.device) // self.restarts]
        unknown = torch.full_like(self.adversarial_loss[image], -torch.inf)
        zero = torch.zeros_like(unknown)
        return APGDState(
            **vars(self.initial_state(image, x)), target=target, previous=x.clone(), gradient=torch.zeros_like(x),
            loss=unknown, best_x=x.clone(), best_gradient=torch.zeros_like(x), best_loss=unknown.clone(),
            step_size=zero.clone(), rises=zero.clone(), checkpoint_loss=unknown.clone(), halved=~zero.bool(),
            density=zero.clone(), changed=zero.clone(),
        )  # fmt: skip

    def step(self, state: APGDState, step: int | None, new: Tensor | None) -> None:
        """Evaluate the iterates, adapt the step size at checkpoints, and step."""
        s, now, previous_loss = state, self._at(state.step), state.loss
        misclassified = self._evaluate(s)
        with torch.no_grad():
            self._start_stage(s, now)
            s.rises = torch.where(now.first, 0.0, s.rises + (s.loss > previous_loss))
            better = now.first | (s.loss > s.best_loss)
            s.best_x = torch.where(per_image(better), s.x, s.best_x)
            s.best_gradient = torch.where(per_image(better), s.gradient, s.best_gradient)
            s.best_loss = torch.where(better, s.loss, s.best_loss)
            s.checkpoint_loss = torch.where(now.first, s.loss, s.checkpoint_loss)
            counted = torch.where(now.final, s.loss, -torch.inf)
            s.record(misclassified & now.final, counted, early_stop=self.early_stop)
            if step is None or self.schedule[step].checkpoint:
                (self._adapt_l1 if self.l1 else self._adapt)(s, now)
            if step != self.passes - 1:
                self._move(s, now, step)

    def _evaluate(self, s: APGDState) -> Tensor:
        """Set loss and gradient to their means over `eot` passes; return whether the mean logits misclassify."""
        x = s.x.detach().requires_grad_()
        gradient, mean_logits, loss = torch.zeros_like(x), torch.zeros(()), torch.zeros(())
        for _ in range(self.eot):
            with torch.enable_grad():
                logits = self.classifier(x)
                losses = self.objective(logits, s.labels, s.target)
                total = losses.sum()
            check_differentiable(total)
            (sample,) = torch.autograd.grad(total, x)
            gradient = gradient + sample.nan_to_num(0, 0, 0) / self.eot
            mean_logits = mean_logits + logits.detach() / self.eot
            loss = loss + losses.detach().float() / self.eot
        s.gradient, s.loss = gradient, loss.nan_to_num(-torch.inf, neginf=-torch.inf, posinf=torch.inf)
        return (mean_logits.argmax(dim=1) != s.labels) & mean_logits.isfinite().all(dim=1)

    def _start_stage(self, s: APGDState, now: Pass) -> None:
        """Reset the step size in the first pass of a ball."""
        s.step_size = torch.where(now.first, now.radius * (1 if self.l1 else 2), s.step_size)
        s.halved = s.halved | now.first
        if self.l1:
            pixels, changed = s.images[0].numel(), _count_changed(s.x, s.images)
            largest = now.radius > 2.5 * self.eps
            s.density = torch.where(now.first, torch.where(largest, 0.2, changed / pixels / 1.5), s.density)
            s.changed = torch.where(now.first, torch.where(largest, float(pixels), changed), s.changed)

    def _move(self, s: APGDState, now: Pass, step: int | None) -> None:
        """Step, or project the best iterate onto the next, smaller ball."""
        x = self._l1_step(s, per_image(now.radius)) if self.l1 else self._step(s, now)
        if self.l1 and (step is None or self.schedule[step].last):
            radius = self._at(s.step + 1).radius
            inside = s.images + self.ball.project(s.best_x - s.images, s.images, per_image(radius))
            x = torch.where(per_image(now.last), inside, x)
            s.x = torch.where(per_image(now.last), inside, s.x)
        s.previous, s.x = s.x, x

    def _step(self, s: APGDState, now: Pass) -> Tensor:
        """z = Π(x + η·normalize(g)); return Π(x + α(z - x) + (1 - α)(x - x_previous))."""
        ahead = s.x + per_image(s.step_size) * self.ball.normalize(s.gradient) - s.images
        ahead = self.ball.project(ahead, s.images, self.eps)
        momentum = per_image(torch.where(now.first, 0.0, MOMENTUM))
        moved = (1 - momentum) * (s.images + ahead - s.x) + momentum * (s.x - s.previous)
        delta = (s.x + moved - s.images).to(s.images.dtype)
        return (s.images + self.ball.project(delta, s.images, self.eps)).clamp(0, 1)

    def _adapt(self, s: APGDState, now: Pass) -> None:
        """Halve the step size and return to the best iterate where the loss rose too seldom."""
        stuck = (s.rises <= RISING * now.window) | (~s.halved & (s.best_loss <= s.checkpoint_loss))
        stuck &= now.checkpoint
        s.step_size = torch.where(stuck, s.step_size / 2, s.step_size)
        s.x = torch.where(per_image(stuck), s.best_x, s.x)
        s.gradient = torch.where(per_image(stuck), s.best_gradient, s.gradient)
        s.halved = torch.where(now.checkpoint, stuck, s.halved)
        s.checkpoint_loss = torch.where(now.checkpoint, s.best_loss, s.checkpoint_loss)
        s.rises = torch.where(now.checkpoint, 0.0, s.rises)

    def _l1_step(self, s: APGDState, radius: Radius) -> Tensor:
        """Step by equal amounts along the pixels with the largest gradients."""
        slopes = s.gradient.flatten(1).abs()  # N D
        pixels = slopes.shape[1]
        rank = ((1 - s.density) * pixels).clamp(0, pixels - 1).long()
        smallest = slopes.sort(dim=1).values.gather(1, rank.unsqueeze(1))
        direction = torch.where(slopes >= smallest, s.gradient.flatten(1).sign(), 0.0).reshape_as(s.gradient)
        count = direction.flatten(1).abs().sum(dim=1).clamp_min(1)
        delta = (s.x + direction * per_image(s.step_size / count) - s.images).to(s.images.dtype)
        return (s.images + self.ball.project(delta, s.images, radius)).clamp(0, 1)

    def _adapt_l1(self, s: APGDState, now: Pass) -> None:
        """Follow the sparsity of the best iterate: the longest steps where it grew sparser, shorter ones elsewhere."""
        changed = _count_changed(s.best_x, s.images)
        sparser = now.checkpoint & (changed / s.changed < 0.95)
        step_size = torch.where(sparser, now.radius, s.step_size / 1.5)
        step_size = torch.minimum(torch.maximum(step_size, now.radius / 10), now.radius)
        s.step_size = torch.where(now.checkpoint, step_size, s.step_size)
        s.density = torch.where(now.checkpoint, changed / s.images.shape[1:].numel() / 1.5, s.density)
        s.x = torch.where(per_image(sparser), s.best_x, s.x)
        s.gradient = torch.where(per_image(sparser), s.best_gradient, s.gradient)
        s.changed = torch.where(now.checkpoint, changed.clamp_min(1), s.changed)


def _count_changed(x: Tensor, images: Tensor) -> Tensor:
    """Return the number of changed pixels, N."""
    return (x - images).flatten(1).ne(0).sum(dim=1).float()
