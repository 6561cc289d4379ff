"""What the doctor says, and whom it looks at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustfpd.attacks.adaptive import View, views
from robustfpd.config import Config
from robustfpd.evaluation.attack_runner import AttackRunner
from robustfpd.evaluation.checks.context import CheckContext
from robustfpd.evaluation.verdict import Check

Outcome = Literal["ok", "warning", "problem", "skipped"]
RADIUS = 8 / 255
"""Of the balls in which answers and gradients are looked at."""


class Finding(Config):
    """One thing that was looked at."""

    name: str
    """Checks of evaluations keep their names, under which `docs/checks.md` explains them."""
    outcome: Outcome
    """`problem`: an evaluation would mislead; `warning`: it may; `skipped`: another finding comes first."""
    evidence: str
    """What was seen, in plain words and numbers."""
    fix: str = ""
    """What to do, with the code to write; empty where nothing is wrong."""


def found(name: str, bad: bool, evidence: str, fix: str, outcome: Outcome = "problem") -> Finding:
    """A finding: `outcome` when `bad`, and else ok, with nothing to mend."""
    return Finding(name=name, outcome=outcome if bad else "ok", evidence=evidence, fix=fix if bad else "")


def told(check: Check, fix: str, outcome: Outcome = "problem") -> Finding:
    """A check of evaluations as a finding: the same judgement, and what to do."""
    if check.outcome == "skipped":
        return Finding(name=check.name, outcome="skipped", evidence=check.evidence)
    return found(check.name, check.outcome != "passed", check.evidence, fix, outcome)


class Patient:
    """A classifier with images in [0, 1] and labels; what was mended on the way is a wrapper around it."""

    def __init__(self, classifier: nn.Module, images: Tensor, labels: Tensor, device: torch.device, seed: int) -> None:
        self.given = classifier
        self.classifier = classifier
        self.images, self.labels = images, labels
        self.device, self.seed = device, seed
        self.bare = True
        """Whether it answers with a tensor."""
        self.logits = torch.zeros(0)
        """Answers to the images as they are, N×K, on the CPU."""

    def ask(self, images: Tensor, classifier: nn.Module | None = None) -> Any:
        """What a classifier answers in evaluation mode, whatever that is; copies are asked."""
        with torch.no_grad():
            return (classifier or self.classifier)(images.to(self.device, copy=True))

    def answers(self, images: Tensor, batch_size: int = 64) -> Tensor:
        """Logits N×K on the CPU, in float32."""
        return torch.cat([self.ask(batch).float().cpu() for batch in torch.split(images, batch_size)])

    @property
    def predictions(self) -> Tensor:
        """Classes of the images as they are, N."""
        return self.logits.argmax(dim=1)

    def subject(self, labels: Tensor) -> CheckContext:
        """As the checks of evaluations want to see it, all images counted as classified correctly."""
        runner = AttackRunner(
            self.classifier, self.images, labels, torch.arange(len(labels)), self.device, "linf", self.seed, 64,
            self.logits.shape[1],
        )  # fmt: skip
        runner.clean = self.predictions
        runner.offer({name: View(module) for name, module in views(self.classifier).items()})
        return CheckContext(runner, torch.ones(len(labels), dtype=torch.bool), (RADIUS,), probes=1)


def skipped(name: str, first: Sequence[str]) -> Finding:
    """Not looked at, because what was found would show here too."""
    return Finding(name=name, outcome="skipped", evidence=f"look again when {' and '.join(first)} is mended")
