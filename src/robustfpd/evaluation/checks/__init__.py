"""Checks that decide whether a robust accuracy can be trusted. Each has an entry in docs/checks.md.

To add a check: write a function that returns a `Check`, enter it below under its name, enter its fix in
`context.FIXES`, and describe it in docs/checks.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.attacks.base import preserve_state, reproducible
from robustfpd.errors import first_line
from robustfpd.evaluation.checks import attacks as attack_checks
from robustfpd.evaluation.checks import binarisation, gradients, inputs, outputs
from robustfpd.evaluation.checks.completeness import NOT_MADE, complete, is_incomplete
from robustfpd.evaluation.checks.context import AttackFindings, CheckContext, is_random, run_check, skipped
from robustfpd.evaluation.record import Check

__all__ = [
    "BEFORE_ATTACKS", "NAMES", "NOT_MADE", "AttackFindings", "CheckContext", "after_attacks", "before_attacks",
    "complete", "input_checks", "is_incomplete", "is_random",
]  # fmt: skip

INPUT_CHECKS: dict[str, Callable[[nn.Module, Tensor], Check]] = {
    "training-mode": inputs.training_mode,
    "images-in-range": lambda classifier, images: inputs.images_in_range(images),
}
"""Of the classifier and the images as given, before evaluation mode."""
SETTING_CHECKS: dict[str, Callable[[CheckContext], Check]] = {
    "stays-in-evaluation-mode": inputs.stays_in_evaluation_mode,
    "clean-accuracy": inputs.clean_accuracy,
    "eps-units": inputs.eps_units,
}
CLASSIFIER_CHECKS: dict[str, Callable[[CheckContext], Check]] = {
    "randomised-outputs": outputs.randomised_outputs,
    "finite-outputs": outputs.finite_outputs,
    "squashed-outputs": outputs.squashed_outputs,
    "batch-composition": outputs.batch_composition,
    "wrapper-accuracy": outputs.wrapper_accuracy,
    "vanishing-gradients": gradients.vanishing_gradients,
    "gradient-agreement": gradients.gradient_agreement,
    "gradient-stability": gradients.gradient_stability,
}
"""Of logits and gradients at correctly classified images."""
PROBE_CHECKS: dict[str, Callable[[CheckContext, Tensor], Check]] = {
    "single-step": attack_checks.single_step,
    "random-noise": attack_checks.random_noise,
    "monotone-in-eps": attack_checks.monotone_in_eps,
    "large-eps": attack_checks.large_eps,
    "earlier-iterate": attack_checks.earlier_iterate,
}
"""Compare attacks on a few images with PGD, whose misclassified images they get."""
SURVIVOR_CHECKS: dict[str, Callable[[CheckContext, AttackFindings], Check]] = {
    "more-steps": attack_checks.more_steps,
    "rugged-loss": gradients.rugged_loss,
}
"""Of the images that survived the suite."""
STRENGTH_CHECKS: dict[str, Callable[[CheckContext, AttackFindings], Check]] = {
    "binarisation": binarisation.binarisation,
}
"""Run the suite's attacks on problems with known solutions."""
RESULT_CHECKS: dict[str, Callable[[CheckContext, AttackFindings], Check]] = {
    "black-box": attack_checks.black_box,
    "failed-attacks": attack_checks.failed_attacks,
    "unchanged-state": attack_checks.unchanged_state,
    "idle-attacks": attack_checks.idle_attacks,
}
"""Of the results of the suite's attacks. They run no network: they are made again when an evaluation is resumed."""
OF_BALLS = frozenset({
    "eps-units", "finite-outputs", "vanishing-gradients", "gradient-agreement", "gradient-stability", *PROBE_CHECKS,
    *SURVIVOR_CHECKS, *STRENGTH_CHECKS,
})  # fmt: skip
"""Checks that need a radius above 0."""
NO_BALL = "no radius is above 0"
NAMES = (
    *INPUT_CHECKS, *SETTING_CHECKS, *CLASSIFIER_CHECKS, *PROBE_CHECKS, *SURVIVOR_CHECKS, *STRENGTH_CHECKS,
    *RESULT_CHECKS, "search-precision", "complete", "contradictions",
)  # fmt: skip
"""All checks of an evaluation, in the order of the verdict."""
BEFORE_ATTACKS = (*INPUT_CHECKS, *SETTING_CHECKS, *CLASSIFIER_CHECKS)
"""Checks that decide on the attacks."""


def input_checks(
    classifier: nn.Module, images: Tensor, resume: Callable[[str, Callable[[], Any]], Any] | None = None
) -> list[Check]:
    """Check classifier and images as given, before anything is put in evaluation mode.

    `resume` returns the saved result of a name, or computes it.
    """
    if resume is None:
        return [check(classifier, images) for check in INPUT_CHECKS.values()]
    made = (resume(name, partial(_values, check, classifier, images)) for name, check in INPUT_CHECKS.items())
    return [Check(**values) for values in made]


def before_attacks(context: CheckContext) -> list[Check]:
    """Check settings, logits and gradients; runs no attack."""
    with preserve_state(context.runner.classifier):
        made = [_make(context, name, partial(check, context)) for name, check in SETTING_CHECKS.items()]
        if len(context.images) == 0:
            return [*made, *(skipped(name, "no image is classified correctly") for name in CLASSIFIER_CHECKS)]
        return [*made, *(_make(context, name, partial(check, context)) for name, check in CLASSIFIER_CHECKS.items())]


def after_attacks(context: CheckContext, findings: AttackFindings) -> list[Check]:
    """Run attacks on a few images and check how they behave; check the results of the suite's attacks."""
    with preserve_state(context.runner.classifier):
        made = _probe_checks(context)
        survivors = [_make(context, n, partial(check, context, findings)) for n, check in SURVIVOR_CHECKS.items()]
        strength = [_make(context, n, partial(check, context, findings)) for n, check in STRENGTH_CHECKS.items()]
    made += [*survivors, *strength, *(check(context, findings) for check in RESULT_CHECKS.values())]
    return [*made, attack_checks.search_precision(context, findings, more_steps=survivors[0])]


def _probe_checks(context: CheckContext) -> list[Check]:
    """Run the checks that share one PGD attack; skip them if it cannot run."""
    if not context.radii:
        return [skipped(name, NO_BALL) for name in PROBE_CHECKS]
    if len(context.probes[0]) == 0:
        return [skipped(name, "the suite has no images for attacks of the checks") for name in PROBE_CHECKS]

    def by_pgd() -> list[bool]:
        with reproducible(context.generator("during pgd")):
            found: list[bool] = attack_checks.misclassified_by_pgd(context).tolist()
        return found

    try:
        found = context.resume("pgd", by_pgd)
    except Exception as error:  # vanishing-gradients reports why
        reason = f"PGD-{attack_checks.STEPS} cannot be run: {first_line(error)}"
        return [skipped(name, reason) for name in PROBE_CHECKS]
    if found is None:
        return [skipped(name, NOT_MADE) for name in PROBE_CHECKS]
    mask = torch.tensor(found, device=context.runner.device)
    return [_make(context, name, partial(check, context, mask)) for name, check in PROBE_CHECKS.items()]


def _make(context: CheckContext, name: str, check: Callable[[], Check]) -> Check:
    """Make one check, or return its saved result; skip it after the evaluation's time limit, or without its ball.

    Each check has its own random state, so that its result does not depend on which others are made again.
    """
    if name in OF_BALLS and not context.radii:
        return skipped(name, NO_BALL)

    def make() -> dict[str, Any]:
        with reproducible(context.generator(f"during {name}")):
            return _values(run_check, name, check)

    values = context.resume(name, make)
    return skipped(name, NOT_MADE) if values is None else Check(**values)


def _values(check: Callable[..., Check], *arguments: Any) -> dict[str, Any]:
    """Return the values of a check, which JSON can hold."""
    return check(*arguments).model_dump(mode="json")
