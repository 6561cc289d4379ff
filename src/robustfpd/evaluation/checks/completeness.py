"""The check that an evaluation ran all attacks and checks."""

from __future__ import annotations

from collections.abc import Sequence

from robustfpd.evaluation.checks.context import AttackFindings, CheckContext, judge
from robustfpd.evaluation.ledger import CLEAN
from robustfpd.evaluation.record import Check

NOT_MADE = "not made: the evaluation ended before"
"""Evidence of a check that an evaluation left out when it ended early."""


def complete(context: CheckContext, findings: AttackFindings, made: Sequence[Check]) -> Check:
    """Check that every attack was run on its images, and every check was made."""
    name, not_made = "complete", [c.name for c in made if c.evidence == NOT_MADE]
    not_run = [r for r in findings.results if r.not_attacked]
    if not findings.ended:
        return judge(name, False, f"all {len(findings.results)} attacks were run, and all checks were made")
    parts = [f"the evaluation ended {findings.ended}"]
    if len(context.runner.images) > findings.classified:
        parts.append(f"{len(context.runner.images) - findings.classified} images were not classified and are left out")
    survivors, unattacked = _survivors(context, findings) if not_run else (0, 0)
    if not_run:
        partly = sum(r.attacked > 0 for r in not_run)
        parts.append(
            f"of {len(findings.results)} attacks {len(not_run) - partly} were not run and {partly} on a part of the "
            f"images; of the {survivors} images counted as robust at eps {context.radii[-1]:.4g}, {unattacked} were "
            "attacked by no attack there and the others by a part of the suite, so that the robust accuracy is an "
            "upper bound"
        )
    parts += [f"checks not made: {', '.join(not_made)}"] if not_made else []
    values = {"attacks": len(not_run), "unattacked": unattacked, "checks": len(not_made)}
    return judge(name, True, "; ".join(parts), **values)


def is_incomplete(context: CheckContext, findings: AttackFindings, made: Sequence[Check]) -> bool:
    """Return whether the evaluation left out images, attacks or checks when it ended early."""
    left_out = any(r.not_attacked for r in findings.results) or any(c.evidence == NOT_MADE for c in made)
    return left_out or findings.classified < len(context.runner.images)


def _survivors(context: CheckContext, findings: AttackFindings) -> tuple[int, int]:
    """Return the survivors, and those of them that no attack was run on at the largest radius."""
    attacked = {row.image for row in findings.rows if row.eps == context.radii[-1] and row.attack != CLEAN}
    survivors = context.runner.data.ids[findings.robust.cpu()].tolist()
    return len(survivors), sum(image not in attacked for image in survivors)
