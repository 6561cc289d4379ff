"""Checks of the results of the suite's attacks."""

from __future__ import annotations

from collections.abc import Sequence

from robustfpd import attacks
from robustfpd.evaluation.attack_runner import CHANGED
from robustfpd.evaluation.checks.context import AttackFindings, CheckContext, judge, skipped
from robustfpd.evaluation.ledger import LedgerRow
from robustfpd.evaluation.record import Check

BLACK_BOX = 0.02  # share of all images that attacks without gradients may misclassify after those with gradients failed


def black_box(context: CheckContext, findings: AttackFindings) -> Check:
    """Check that attacks without the classifier's gradients find nothing that those with gradients missed."""
    name, views, specs = "black-box", context.runner.views, findings.specs
    without = {s.label for s in specs if views[s.view].surrogate or attacks.get(s.attack).access != "gradients"}
    tried = [r for r in findings.rows if r.attack in without and r.eps > 0]
    if not tried:
        return skipped(name, "no attack without gradients was run on images that survived the others")
    white_box_rows: dict[int, list[LedgerRow]] = {}
    for row in findings.rows:
        if row.eps > 0 and row.attack not in without:
            white_box_rows.setdefault(row.image, []).append(row)
    only = [r for r in tried if r.outcome == "misclassified" and _survived(r, white_box_rows.get(r.image, []))]
    labels = ", ".join(dict.fromkeys(r.attack for r in only))
    count = len({r.image for r in only})
    evidence = f"of {len({r.image for r in tried})} images, {count} survived attacks with the classifier's gradients "
    evidence += f"and are misclassified under attacks without{f' ({labels})' if labels else ''}"
    return judge(name, count > max(1, BLACK_BOX * len(findings.robust)), evidence, turned=len(only))


def failed_attacks(context: CheckContext, findings: AttackFindings) -> Check:
    """Check that every attack ran on all its images and stayed in its ball."""
    name, failed = "failed-attacks", [r for r in findings.rows if r.outcome == "failed"]
    if not failed:
        return judge(name, False, f"all {len(findings.results)} attacks ran on all their images", failed=0)
    labels = ", ".join(dict.fromkeys(r.attack for r in failed))
    evidence = f"{labels} failed on {len(failed)} images, which count as robust there; the first: {failed[0].note}"
    everywhere = all(r.failed == r.attacked for r in findings.results if r.attacked)
    return judge(name, True, evidence, "", "failed" if everywhere else "suspicious", failed=len(failed))


def unchanged_state(context: CheckContext, findings: AttackFindings) -> Check:
    """Check that no attack changed the classifier's parameters or buffers."""
    name, changed = "unchanged-state", [r for r in findings.rows if r.note.startswith(CHANGED)]
    if not changed:
        return judge(name, False, "parameters and buffers are unchanged after every attack")
    labels = ", ".join(dict.fromkeys(r.attack for r in changed))
    return judge(name, True, f"{labels}: {changed[0].note}; restored after each batch")


def idle_attacks(context: CheckContext, findings: AttackFindings) -> Check:
    """Check that every attack with a fixed radius changed an image."""
    idle = []
    for spec in findings.specs:
        rows = [r for r in findings.rows if r.attack == spec.label and r.outcome != "failed"]
        if rows and not attacks.get(spec.attack).minimal and all(r.distance == 0 for r in rows):
            idle.append(spec.label)
    evidence = f"{len(idle)} attacks returned every image unchanged" + (f": {', '.join(idle)}" if idle else "")
    return judge("idle-attacks", bool(idle), evidence, idle=len(idle))


def search_precision(context: CheckContext, findings: AttackFindings, more_steps: Check) -> Check:
    """Check that attacks used float32 gradients, or that float32 attacks find next to nothing more."""
    name = "search-precision"
    if not context.runner.bfloat16:
        return judge(name, False, "attacks differentiated the classifier without reduced precision")
    evidence = "attacks differentiated the classifier in bfloat16; float32 confirmed every adversarial example"
    if not bool(findings.robust.any()):
        return judge(name, False, f"{evidence}, and no image is robust")
    if more_steps.outcome == "skipped":
        return judge(name, True, f"{evidence}, but no survivor was attacked in float32")
    return judge(name, more_steps.outcome != "passed", f"{evidence}. {more_steps.evidence}", **more_steps.values)


def _survived(row: LedgerRow, white_box_rows: Sequence[LedgerRow]) -> bool:
    """Return whether white-box attacks were run on the row's image up to its radius and none succeeded."""
    up_to = [r for r in white_box_rows if r.eps <= row.eps]
    return bool(up_to) and all(r.outcome != "misclassified" for r in up_to)
