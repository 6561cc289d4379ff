"""Can the number be trusted? Each check has its entry in docs/checks.md."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from robustfpd.attacks.base import preserve_state, reproducible
from robustfpd.evaluation.checks import attacks as attack_checks
from robustfpd.evaluation.checks import gradients, outputs, results
from robustfpd.evaluation.checks.context import CheckContext, Findings, guarded, skipped
from robustfpd.evaluation.checks.inputs import (
    clean_accuracy,
    eps_units,
    images_in_range,
    stays_in_evaluation,
    training_mode,
)
from robustfpd.evaluation.verdict import Check

__all__ = ["NAMES", "CheckContext", "Findings", "after_attacks", "before_attacks", "handed_over", "is_random"]

_LOOKING = {
    outputs.RANDOM: outputs.randomised, "finite-outputs": outputs.finite, "squashed-outputs": outputs.squashed,
    "batch-composition": outputs.batches, "wrapper-accuracy": outputs.wrappers,
    "vanishing-gradients": gradients.vanishing, "gradient-agreement": gradients.agreement,
    "gradient-stability": gradients.stability,
}  # fmt: skip
_PROBING = (
    "single-step",
    "random-noise",
    "monotone-in-eps",
    "large-eps",
    "earlier-iterate",
    "more-steps",
    "rugged-loss",
)
_RESULTS = ("black-box", "failed-attacks", "unchanged-state", "idle-attacks", "search-precision")
NAMES = (
    "training-mode", "images-in-range", "stays-in-evaluation-mode", "clean-accuracy", "eps-units", *_LOOKING,
    *_PROBING, *_RESULTS,
)  # fmt: skip
"""All checks, in the order of the verdict."""


def handed_over(classifier: nn.Module, images: Tensor, device: torch.device) -> list[Check]:
    """Check what was handed over, before anything is put in evaluation mode."""
    return [training_mode(classifier, images, device), images_in_range(images)]


def before_attacks(subject: CheckContext) -> list[Check]:
    """Check answers and gradients of the classifier."""
    found = [stays_in_evaluation(subject), clean_accuracy(subject), eps_units(subject)]
    if len(subject.images) == 0:
        return [*found, *(skipped(name, "no image is classified correctly") for name in _LOOKING)]
    with preserve_state(subject.runner.classifier), reproducible(subject.draws("before attacks")):
        return [*found, *(guarded(name, partial(check, subject)) for name, check in _LOOKING.items())]


def after_attacks(subject: CheckContext, findings: Findings) -> list[Check]:
    """Check how attacks behave on a few images, and what the suite's brought home."""
    with preserve_state(subject.runner.classifier), reproducible(subject.draws("after attacks")):
        probed = [
            *attack_checks.probing(subject),
            guarded("more-steps", partial(attack_checks.more_steps, subject, findings)),
            guarded("rugged-loss", partial(gradients.ruggedness, subject, findings)),
        ]  # fmt: skip
    return [
        *probed, results.blind(subject, findings), results.failures(findings), results.state_changes(findings),
        results.idle(findings), results.precision(subject, findings, probed),
    ]  # fmt: skip


def is_random(checks: Sequence[Check]) -> bool:
    """Whether the classifier was found to answer the same question differently."""
    return any(c.name == outputs.RANDOM and c.outcome != "passed" and c.outcome != "skipped" for c in checks)
