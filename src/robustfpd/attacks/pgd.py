"""FGSM, BIM and PGD in any Lp ball, and random noise, a baseline for all attacks.

Goodfellow et al., ICLR 2015 (FGSM); Kurakin et al., ICLR workshop 2017 (BIM); Madry et al., ICLR 2018 (PGD).

Iterates are projected before they are differentiated. A clamp inside the differentiated function would have zero
gradient wherever a pixel is 0 or 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustfpd.attacks.base import (
    attack,
    check_batch_size,
    check_counts,
    check_differentiable,
    check_logits,
    check_positive,
    check_shape,
    record_queries,
)  # fmt: skip
from robustfpd.attacks.batching import BatchState, IterativeAttack, SampleRNG, run
from robustfpd.attacks.losses import Loss, LossFunction, loss_function
from robustfpd.attacks.norms import lp_ball, per_image
from robustfpd.config import Norm


@attack("fgsm")
def fgsm(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", loss: Loss = "ce",
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Fast gradient sign method: one step of length eps from the image (Goodfellow et al., ICLR 2015).

    In L∞, x' = clip(x + eps·sign(∇ₓ loss), 0, 1). Weak in L1, where one dense step moves every pixel by little.
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
    """Basic iterative method: PGD from the image (Kurakin et al., 2017).

    `step_size` None takes eps/steps, in L1 times 4·√d for d pixels. Arguments, result and errors as in `pgd`;
    `generator` is not used.
    """
    if step_size is None:
        step_size = eps / max(steps, 1) * lp_ball(norm).step_scale(images[0].numel())
    return pgd(
        classifier, images, labels, eps=eps, norm=norm, steps=steps, step_size=step_size, random_start=False, loss=loss,
        generator=generator,
    )  # fmt: skip


@attack("pgd")
def pgd(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 40,
    step_size: float | None = None, restarts: int = 1, random_start: bool = True, loss: Loss = "ce",
    early_stop: bool = False, batch_size: int | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Projected gradient descent, untargeted (Madry et al., ICLR 2018).

    x ← Π(x + step_size·normalize(∇ₓ loss)), with Π the exact projection onto ball ∩ [0, 1] (see `LpBall`). The
    classifier runs in evaluation mode; its training flags, parameters, gradients and statistics do not change.

    Args:
        classifier: images N×C×H×W in [0, 1] → logits N×K.
        images: N×C×H×W in [0, 1].
        labels: N, the true classes (or the classifier's own predictions).
        eps: radius of the ball, in pixels of [0, 1] (8/255, not 8); 0 returns the images.
        norm: `linf`, `l2` or `l1`.
        steps: gradient steps per restart.
        step_size: length of every step in `norm`. None starts at eps (in L1 at 4·√d·eps for d pixels) and decays to
            zero along half a cosine, which finds more than any constant length.
        restarts: starting points per image; an image is not attacked again once it is misclassified.
        random_start: start at a random point of the ball instead of the image.
        loss: `ce` (cross-entropy), `margin` (largest wrong logit minus the true one), `dlr` (the margin relative to
            the logits' scale), or a function of logits N×K and labels N that returns N losses to maximize.
        early_stop: stop attacking an image at its first misclassified iterate and return that one; saves passes.
        batch_size: images per pass through the classifier; waiting images replace those that are misclassified or
            finished. None takes all. It changes results by rounding only.
        generator: source of random starts; None takes a new one with seed 0.

    Returns:
        N×C×H×W in ball ∩ [0, 1]: for each image, the misclassified iterate with the largest loss, or the iterate with
        the largest loss if none is misclassified.

    Raises:
        InputError: invalid images, labels, eps, norm or option; the classifier's output is not N×K, not finite, or
            does not depend differentiably on the images.
    """
    check_counts(steps=steps, restarts=restarts)
    check_batch_size(batch_size)
    ball = lp_ball(norm)
    if step_size is None:
        first = eps * ball.step_scale(images[0].numel())
        step_sizes = [first * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]
    else:
        check_positive(step_size=step_size)
        step_sizes = [step_size] * steps
    assert generator is not None  # Attack.__call__ sets it
    iterations = PGD(
        classifier, images, labels, ball, eps, early_stop, step_sizes=step_sizes, loss=loss_function(loss),
        rng=SampleRNG(generator) if random_start else None,
    )  # fmt: skip
    run(iterations, torch.arange(len(images), device=images.device), restarts, batch_size)
    return iterations.adversarial


@attack("noise", access="decisions")
@torch.no_grad()
def noise(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", samples: int = 20,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Random noise: the first misclassified of `samples` points, by turns uniform in the ball and on its surface.

    Arguments, result and errors as in `pgd`; returns the last point of images for which none is misclassified.
    """
    assert generator is not None  # Attack.__call__ sets it
    check_counts(samples=samples)
    ball, result = lp_ball(norm), images.clone()
    surviving = torch.arange(len(images), device=images.device)
    queries = torch.zeros(len(images), dtype=torch.long, device=images.device)
    for draw in range(samples):
        x = images[surviving]
        delta = ball.sample(x, eps, generator)
        if draw % 2:  # on the surface: in few dimensions most of the ball is near its centre
            length = per_image(ball.norm(delta).clamp_min(1e-12))
            direction = ball.normalize(delta) if norm == "linf" else delta / length
            delta = ball.project(direction * eps, x, eps)
        candidates = (x + delta).clamp(0, 1)
        logits = check_logits(classifier(candidates), labels[surviving])
        queries[surviving] += 1
        result[surviving] = candidates
        surviving = surviving[logits.argmax(dim=1) == labels[surviving]]
        if len(surviving) == 0:
            break
    record_queries(classifier, queries)
    return result


@dataclass(eq=False)
class PGD(IterativeAttack[BatchState]):
    """Projected gradient steps of given lengths, and a last pass without gradient."""

    step_sizes: Sequence[float]
    loss: LossFunction
    rng: SampleRNG | None
    """Source of random starts; None starts at the images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.passes = len(self.step_sizes) + 1
        self._step_sizes = torch.tensor([*self.step_sizes, 0.0], device=self.images.device, dtype=self.images.dtype)

    def start(self, image: Tensor, restart: Sequence[int]) -> BatchState:
        """Start at a random point of the ball, or at the image."""
        images = self.images[image]
        x = images.clone()
        if self.rng is not None:
            x.add_(self.ball.sample(images, self.eps, self.rng.generators(image, restart))).clamp_(0, 1)
        return self.initial_state(image, x)

    def step(self, state: BatchState, step: int | None, new: Tensor | None) -> None:
        """Take a gradient step, except in the last pass."""
        last = step == self.passes - 1
        x = state.x.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            logits = self.classifier(x)
            if new is not None:
                check_logits(check_shape(logits, state.labels)[new], state.labels[new])
            losses = self.loss(logits, state.labels)
            total = losses.sum()
        with torch.no_grad():
            misclassified = (logits.argmax(dim=1) != state.labels) & logits.isfinite().all(dim=1)
            state.record(misclassified, losses.detach().float(), early_stop=self.early_stop)
        if last:
            return
        check_differentiable(total)
        (gradient,) = torch.autograd.grad(total, x)
        step_size = per_image(self._step_sizes[state.step]) if step is None else self.step_sizes[step]
        with torch.no_grad():
            self.ball.step(state.x, gradient, step_size, state.images, self.eps)
