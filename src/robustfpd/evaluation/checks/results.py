"""Checks of what the attacks brought home."""

from __future__ import annotations

from collections.abc import Sequence

from robustfpd import attacks
from robustfpd.attacks.adaptive import View
from robustfpd.evaluation.attack_runner import CHANGED
from robustfpd.evaluation.checks.context import CheckContext, Findings, judged, skipped
from robustfpd.evaluation.ledger import LedgerRow
from robustfpd.evaluation.verdict import Check

BLIND = 0.02
"""Share of all images that attacks without the classifier's gradients may turn after those with them."""


def failures(findings: Findings) -> Check:
    """Did every attack run on every image it was given, and stay in its ball?"""
    failed = [r for r in findings.rows if r.outcome == "failed"]
    if not failed:
        return judged("failed-attacks", False, f"all {len(findings.results)} attacks ran on all their images", failed=0)
    labels = list(dict.fromkeys(r.attack for r in failed))
    first = failed[0]
    nothing = all(r.failed == r.attacked for r in findings.results if r.attacked)
    return Check(
        name="failed-attacks", outcome="failed" if nothing else "suspicious", values={"failed": len(failed)},
        evidence=f"{', '.join(labels)} failed on {len(failed)} images, which count as robust there; the first: "
        f"{first.note}",
    )  # fmt: skip


def state_changes(findings: Findings) -> Check:
    """Did an attack change the classifier's weights or statistics?"""
    changed = [r for r in findings.rows if r.note.startswith(CHANGED)]
    if not changed:
        return judged("unchanged-state", False, "weights and statistics are what they were after every attack")
    labels = ", ".join(dict.fromkeys(r.attack for r in changed))
    return judged("unchanged-state", True, f"{labels}: {changed[0].note}; it was put back after each batch")


def idle(findings: Findings) -> Check:
    """Did an attack with a fixed radius hand every image back as it was?"""
    idle_labels = []
    for planned in findings.planned:
        rows = [r for r in findings.rows if r.attack == planned.label and r.outcome != "failed"]
        if rows and not attacks.get(planned.attack).minimal and all(r.distance == 0 for r in rows):
            idle_labels.append(planned.label)
    evidence = f"{len(idle_labels)} attacks handed every image back unchanged"
    more = f": {', '.join(idle_labels)}" if idle_labels else ""
    return judged("idle-attacks", bool(idle_labels), evidence + more, idle=len(idle_labels))


def precision(subject: CheckContext, findings: Findings, before: Sequence[Check]) -> Check:
    """Did attacks see the classifier's gradients in float32, or float32 attacks turn little of what others left?"""
    name = "search-precision"
    if not subject.runner.bfloat16:
        return judged(name, False, "attacks differentiated the classifier without reduced precision")
    told = "attacks differentiated the classifier in bfloat16; float32 confirmed every success"
    if not bool(findings.standing.any()):
        return judged(name, False, f"{told}, and no image stands")
    longer = next(c for c in before if c.name == "more-steps")
    if longer.outcome == "skipped":
        return judged(name, True, f"{told}, but nothing that stands was attacked in float32: evaluate with fp32")
    return judged(name, longer.outcome != "passed", f"{told}. In float32, {longer.evidence}", **longer.values)


def blind(subject: CheckContext, findings: Findings) -> Check:
    """Do attacks without the classifier's gradients turn what those with them left?"""
    name = "black-box"
    views: dict[str, View] = subject.runner.views
    without = {p.label for p in findings.planned if _sees_nothing(p.attack, views[p.view])}
    tried = [r for r in findings.rows if r.attack in without and r.eps > 0]
    if not tried:
        return skipped(name, "no attack without gradients was run on what the others left")
    seen: dict[int, list[LedgerRow]] = {}
    for row in findings.rows:
        if row.eps > 0 and row.attack not in without:
            seen.setdefault(row.image, []).append(row)
    turned = [r for r in tried if r.outcome == "misclassified" and _withstood_before(r, seen.get(r.image, []))]
    labels = ", ".join(dict.fromkeys(r.attack for r in turned))
    evidence = (
        f"of {len({r.image for r in tried})} images tried, {len({r.image for r in turned})} fell to attacks that do "
        f"not use the classifier's gradients and had robust those that do{f' ({labels})' if labels else ''}"
    )
    images = len(findings.standing)
    return judged(name, len({r.image for r in turned}) > max(1, BLIND * images), evidence, turned=len(turned))


def _sees_nothing(attack: str, view: View) -> bool:
    return view.surrogate or attacks.get(attack).access != "gradients"


def _withstood_before(row: LedgerRow, seen: Sequence[LedgerRow]) -> bool:
    """Whether attacks with gradients were tried on the image at this radius or below, and none turned it."""
    before = [r for r in seen if r.eps <= row.eps]
    return bool(before) and all(r.outcome != "misclassified" for r in before)
