"""Batches kept full: as images fall or finish, those that wait take their places.

A search sees rows, each an image at work. An image has several starts, one after the other, until it is misclassified;
each start takes the same number of passes. Nothing drawn or decided for an image depends on the others in its batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import torch
from torch import Tensor

from robustfpd.rng import generator as seeded

LOOK_EVERY = 8
"""Passes between two looks at what has misclassified, on a GPU, which must finish all that waits for it to tell."""


@dataclass
class BatchState:
    """What is known of each image at work; every field of a subclass is a tensor with a row per image."""

    image: Tensor
    """Its place among the images of the attack."""
    step: Tensor
    """Passes that it has had."""
    misclassified: Tensor
    """Whether a misclassified point was found."""

    def put(self, places: Tensor, rows: BatchState) -> None:
        """Let other images take the places of these."""
        for field in fields(self):
            getattr(self, field.name)[places] = getattr(rows, field.name)

    def keep(self, places: Tensor) -> None:
        """Drop all images but these."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[places])


R = TypeVar("R", bound=BatchState)


class IterativeAttack(ABC, Generic[R]):
    """An attack that looks at one point of each image in every pass."""

    length: int
    """Passes of each start."""
    early: bool
    """An image leaves as soon as it has misclassified."""

    @abstractmethod
    def begin(self, image: Tensor, start: Sequence[int]) -> R:
        """BatchState of images, by place, at their starts, by number."""

    @abstractmethod
    def look(self, rows: R, at: int | None, fresh: Tensor | None) -> None:
        """Ask the classifier about the points of all rows, note what was found, and move on.

        Args:
            rows: images at work.
            at: passes that all of them have had; None where they differ.
            fresh: places of those that have had none.
        """

    @abstractmethod
    def end(self, rows: R, places: Tensor) -> None:
        """Keep what was found of the rows at these places: they leave."""


def run(search: IterativeAttack[R], images: Tensor, starts: int, batch_size: int | None) -> None:
    """IterativeAttack from `starts` starts of each image until it has misclassified, `batch_size` images at a time.

    Args:
        search: what is done.
        images: places of the images, N.
        starts: how many starts each has.
        batch_size: images that go through the classifier at once; None takes all.
    """
    waiting = deque((image, 0) for image in images.tolist())
    work = [waiting.popleft() for _ in range(min(batch_size or len(waiting), len(waiting)))]
    if not work:
        return
    rows, passed = _rows(search, work, images), [0] * len(work)
    fresh: Tensor | None = torch.arange(len(work), device=images.device)
    every, since = _look_every(images.device), 0
    while True:
        search.look(rows, passed[0] if min(passed) == max(passed) else None, fresh)
        rows.step += 1
        passed, since, fresh = [p + 1 for p in passed], since + 1, None
        if max(passed) < search.length and (not search.early or since < every):
            continue
        fell, since = rows.misclassified.tolist(), 0
        left = [
            i for i, (p, f) in enumerate(zip(passed, fell, strict=True)) if p == search.length or (f and search.early)
        ]
        if not left:
            continue
        search.end(rows, torch.tensor(left, device=images.device))
        waiting.extend((work[i][0], work[i][1] + 1) for i in left if not fell[i] and work[i][1] + 1 < starts)
        filled = left[: len(waiting)]
        for place in filled:
            work[place], passed[place] = waiting.popleft(), 0
        if filled:
            fresh = torch.tensor(filled, device=images.device)
            rows.put(fresh, _rows(search, [work[i] for i in filled], images))
        if len(filled) < len(left):
            stay = sorted({*range(len(work))} - {*left[len(filled) :]})
            if not stay:
                return
            rows.keep(torch.tensor(stay, device=images.device))
            work, passed = [work[i] for i in stay], [passed[i] for i in stay]
            fresh = None if fresh is None else torch.tensor(
                [i for i, p in enumerate(passed) if p == 0], device=images.device
            )  # fmt: skip


def _look_every(device: torch.device) -> int:
    return 1 if device.type == "cpu" else LOOK_EVERY


def _rows(search: IterativeAttack[R], work: Sequence[tuple[int, int]], like: Tensor) -> R:
    places, starts = zip(*work, strict=True)
    return search.begin(torch.tensor(places, device=like.device), starts)


class SampleRNG:
    """A source of random numbers for each image and start, whatever else is drawn."""

    def __init__(self, generator: torch.Generator) -> None:
        drawn = torch.randint(2**62, (1,), generator=generator, device=generator.device)
        self.root = int(drawn)

    def of(self, image: Tensor, start: Sequence[int]) -> list[torch.Generator]:
        """Generators of images, by place, at their starts, by number."""
        return [seeded(self.root, i, s) for i, s in zip(image.tolist(), start, strict=True)]
