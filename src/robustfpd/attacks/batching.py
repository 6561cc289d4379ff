"""Iterative attacks in full batches: waiting images replace those that are misclassified or finished.

A batch state has one row per image under attack. An image has several restarts, one after the other, until it is
misclassified; each takes the same number of passes through the classifier. No random draw and no decision for an image
depends on the other images in its batch, so the batch size changes results by rounding only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from robustfpd.attacks.norms import LpBall, per_image
from robustfpd.rng import generator as seeded


@dataclass
class BatchState:
    """Tensors with one row per image under attack."""

    image: Tensor  # index among the images of the attack
    step: Tensor  # passes so far in this restart
    misclassified: Tensor  # an adversarial example was found
    images: Tensor  # the clean images, N×C×H×W
    labels: Tensor
    x: Tensor  # the current iterate, in ball and box
    adversarial: Tensor  # the best iterate: misclassified ones first, then by loss
    adversarial_loss: Tensor

    def replace(self, rows: Tensor, other: BatchState) -> None:
        """Overwrite these rows with those of another state."""
        for name in (f.name for f in fields(self)):
            getattr(self, name)[rows] = getattr(other, name)

    def select(self, rows: Tensor) -> None:
        """Drop all other rows."""
        for name in (f.name for f in fields(self)):
            setattr(self, name, getattr(self, name)[rows])

    def record(self, misclassified: Tensor, loss: Tensor, *, early_stop: bool) -> None:
        """Keep `x` where it is better than the best iterate so far; a loss of NaN or -∞ is never better.

        With `early_stop` the first misclassified iterate stays, not the one with the largest loss.
        """
        better = (misclassified == self.misclassified) & (loss > self.adversarial_loss)
        if early_stop:
            better &= ~self.misclassified
        better |= misclassified & ~self.misclassified
        torch.where(per_image(better), self.x, self.adversarial, out=self.adversarial)
        torch.where(better, loss, self.adversarial_loss, out=self.adversarial_loss)
        self.misclassified |= misclassified


S = TypeVar("S", bound=BatchState)


@dataclass(eq=False)
class IterativeAttack(ABC, Generic[S]):
    """An attack that evaluates one point of each image per pass."""

    classifier: nn.Module
    images: Tensor  # N×C×H×W in [0, 1]
    labels: Tensor
    ball: LpBall
    eps: float
    early_stop: bool  # stop attacking an image at its first misclassified iterate
    passes: int = field(init=False)  # of each restart

    def __post_init__(self) -> None:
        self.adversarial = self.images.clone()  # the result: the best iterate over all restarts
        self.adversarial_loss = torch.full((len(self.images),), -torch.inf, device=self.images.device)

    @abstractmethod
    def start(self, image: Tensor, restart: Sequence[int]) -> S:
        """Return the state of images, by index, at the starting points of these restarts."""

    @abstractmethod
    def step(self, state: S, step: int | None, new: Tensor | None) -> None:
        """Evaluate the current iterates, record the best ones and compute the next.

        Args:
            state: the batch.
            step: passes so far, if that is the same for all rows.
            new: rows that have had no pass yet.
        """

    def initial_state(self, image: Tensor, x: Tensor) -> BatchState:
        """Return the state of images, by index, at starting points `x`."""
        return BatchState(
            image=image, step=torch.zeros_like(image), misclassified=torch.zeros_like(image, dtype=torch.bool),
            images=self.images[image], labels=self.labels[image], x=x, adversarial=x.clone(),
            adversarial_loss=torch.full_like(self.adversarial_loss[image], -torch.inf),
        )  # fmt: skip

    def finish(self, state: S, rows: Tensor) -> None:
        """Store the best iterates of these rows where they are better than those of earlier restarts."""
        image, loss = state.image[rows], state.adversarial_loss[rows]
        better = state.misclassified[rows] | (loss > self.adversarial_loss[image])
        self.adversarial[image] = torch.where(per_image(better), state.adversarial[rows], self.adversarial[image])
        self.adversarial_loss[image] = torch.where(better, loss, self.adversarial_loss[image])


def run(attack: IterativeAttack[S], images: Tensor, restarts: int, batch_size: int | None) -> None:
    """Attack images, by index, from `restarts` starting points each, until they are misclassified.

    Each pass through the classifier takes `batch_size` images; None takes all. `attack` holds the result.
    """
    queue = deque((image, 0) for image in images.tolist())
    work = [queue.popleft() for _ in range(min(batch_size or len(queue), len(queue)))]  # (image, restart) of each row
    if not work:
        return
    state, steps = _start(attack, work, images.device), [0] * len(work)
    new: Tensor | None = torch.arange(len(work), device=images.device)
    interval, since_sync = _sync_interval(images.device), 0
    while work:
        attack.step(state, steps[0] if min(steps) == max(steps) else None, new)
        state.step += 1
        steps, since_sync, new = [s + 1 for s in steps], since_sync + 1, None
        if max(steps) < attack.passes and (not attack.early_stop or since_sync < interval):
            continue
        misclassified, since_sync = state.misclassified.tolist(), 0
        done = [
            row for row, step in enumerate(steps)
            if step == attack.passes or (attack.early_stop and misclassified[row])
        ]  # fmt: skip
        if not done:
            continue
        attack.finish(state, torch.tensor(done, device=images.device))
        again = [work[row] for row in done if not misclassified[row]]
        queue.extend((image, restart + 1) for image, restart in again if restart + 1 < restarts)
        refilled, removed = done[: len(queue)], set(done[len(queue) :])
        if refilled:
            for row in refilled:
                work[row], steps[row] = queue.popleft(), 0
            rows = torch.tensor(refilled, device=images.device)
            state.replace(rows, _start(attack, [work[row] for row in refilled], images.device))
        if removed:
            kept = [row for row in range(len(work)) if row not in removed]
            work, steps = [work[row] for row in kept], [steps[row] for row in kept]
            state.select(torch.tensor(kept, dtype=torch.long, device=images.device))
        if refilled:
            new = torch.tensor([row for row, step in enumerate(steps) if step == 0], device=images.device)


def _start(attack: IterativeAttack[S], work: Sequence[tuple[int, int]], device: torch.device) -> S:
    images, restarts = zip(*work, strict=True)
    return attack.start(torch.tensor(images, device=device), restarts)


def _sync_interval(device: torch.device) -> int:
    """Return the passes between two checks for misclassified images; on a GPU each waits for all queued work."""
    return 1 if device.type == "cpu" else 8


class SampleRNG:
    """Random generators, one per image and restart, so that no draw depends on the batch."""

    def __init__(self, generator: torch.Generator) -> None:
        self.root = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))

    def generators(self, image: Tensor, restart: Sequence[int]) -> list[torch.Generator]:
        """Return the generators of images, by index, at these restarts."""
        return [seeded(self.root, i, r) for i, r in zip(image.tolist(), restart, strict=True)]
