"""What the checks look at, and how they say what they saw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustfpd.attacks.adaptive import PRE_SQUASH
from robustfpd.attacks.query_counter import QueryCounter
from robustfpd.errors import first_line
from robustfpd.evaluation.attack_runner import AttackRunner
from robustfpd.evaluation.ledger import LedgerRow
from robustfpd.evaluation.record import AttackResult
from robustfpd.evaluation.suites import AttackSpec
from robustfpd.evaluation.verdict import Check
from robustfpd.rng import generator

LOOKED_AT = 32
"""Images for the checks that attack nothing."""


class CheckContext:
    """The classifier under evaluation, with images that it classifies correctly."""

    def __init__(self, runner: AttackRunner, correct: Tensor, radii: Sequence[float], probes: int) -> None:
        self.runner, self.radii, self.norm, self.seed = runner, radii, runner.norm, runner.seed
        self.classifier = QueryCounter(runner.classifier)
        self.squashed = PRE_SQUASH in runner.views
        """Its logits before squashing are attacked too."""
        self.white: nn.Module = runner.views[PRE_SQUASH].module if self.squashed else self.classifier
        """What gradients are asked of: the logits before squashing where they can be had."""
        right = torch.nonzero(correct).flatten()
        chosen = right[torch.randperm(len(right), generator=generator(runner.seed, "probes"))]
        self.images, self.labels = self._take(chosen[:LOOKED_AT].sort().values)
        self.probes, self.probe_labels = self._take(chosen[:probes].sort().values)

    def at(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels, on the classifier's device."""
        return self._take(indices)

    def draws(self, purpose: str) -> torch.Generator:
        """A generator for one check."""
        return generator(self.seed, "check", purpose)

    def _take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        runner = self.runner
        return runner.images[indices].to(runner.device), runner.labels[indices].to(runner.device)


@dataclass(frozen=True)
class Findings:
    """What the attacks found."""

    planned: Sequence[AttackSpec]
    rows: Sequence[LedgerRow]
    results: Sequence[AttackResult]
    standing: Tensor
    """Which images robust everything, N."""
    closest: Tensor
    """How near each came to falling, N."""


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """What a check says; one that the classifier makes impossible is suspicious, and the others go on."""
    try:
        return check()
    except Exception as error:  # a classifier may raise anything
        evidence = f"it cannot be made: {type(error).__name__}: {first_line(error)}"
        return Check(name=name, outcome="suspicious", evidence=evidence)


def passed(name: str, evidence: str, **values: float) -> Check:
    """Nothing wrong was seen."""
    return Check(name=name, outcome="passed", evidence=evidence, values=values)


def skipped(name: str, why: str) -> Check:
    """There was nothing to look at."""
    return Check(name=name, outcome="skipped", evidence=why)


def judged(name: str, bad: bool, evidence: str, **values: float) -> Check:
    """Passed, or suspicious when `bad`."""
    return Check(name=name, outcome="suspicious" if bad else "passed", evidence=evidence, values=values)
