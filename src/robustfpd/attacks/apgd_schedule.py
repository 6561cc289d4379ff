"""When Auto-PGD checks its steps and, in L1, shrinks its ball: a table with an entry for each pass of a start.

Croce & Hein, ICML 2020, section 3.1 (checkpoints); Croce & Hein, ICML 2021, section 4 (L1).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

SHRINKING = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))
"""In L1 the ball shrinks: its radius over eps, and the share of the steps spent at it."""


class _Pass(NamedTuple):
    """What is due at one pass."""

    radius: float
    begins: bool
    ends: bool
    counts: bool
    checks: bool
    window: int


@dataclass(frozen=True)
class Due:
    """What is due at a pass; for several images, each at its own, N."""

    radius: Tensor
    """Of the ball that is searched."""
    begins: Tensor
    """The first look in this ball."""
    ends: Tensor
    """The last look before a smaller ball."""
    counts: Tensor
    """It is the ball that was asked for."""
    checks: Tensor
    """Steps are judged by what they brought since the last check."""
    window: Tensor
    """Steps since the last check."""


class Schedule:
    """All passes of a start."""

    def __init__(self, steps: int, eps: float, device: torch.device, *, sparse: bool) -> None:
        """Take `steps` steps in the ball of radius `eps`, in L1 where `sparse`."""
        self._passes: list[_Pass] = []
        left = steps
        for factor, share in SHRINKING if sparse else ((1.0, 1.0),):
            here = left if factor == 1 else min(left, round(share * steps))
            left -= here
            if here:
                self._stage(factor * eps, here, last=factor == 1, sparse=sparse)
        self._due = Due(*(torch.tensor(column, device=device) for column in zip(*self._passes, strict=True)))

    def __len__(self) -> int:
        return len(self._passes)

    def _stage(self, radius: float, steps: int, *, last: bool, sparse: bool) -> None:
        """A look at the start, and one after each step."""
        window = since = max(int((0.04 if sparse else 0.22) * steps), 1)
        self._passes.append(_Pass(radius, True, False, last, False, 0))
        for step in range(steps):
            since -= 1
            self._passes.append(_Pass(radius, False, not last and step == steps - 1, last, since == 0, window))
            if since == 0:
                if not sparse:
                    window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
                since = window

    @property
    def first_radius(self) -> float:
        """Of the ball in which a start lies."""
        return self._passes[0].radius

    def at(self, step: Tensor) -> Due:
        """What is due for images, N, that have had so many passes."""
        step = step.clamp_max(len(self) - 1)
        return Due(*(getattr(self._due, field.name)[step] for field in fields(Due)))

    def checks(self, step: int | None) -> bool:
        """Whether anything may be checked at this pass, or at one that is not the same for all."""
        return step is None or self._passes[step].checks

    def ends(self, step: int | None) -> bool:
        """Whether any ball may shrink after this pass."""
        return step is None or self._passes[step].ends
