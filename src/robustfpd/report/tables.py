"""Tables of results for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from robustfpd.evaluation import AttackResult, EvaluationRecord

STYLES = {"trusted": "green", "suspect": "yellow", "broken": "red"}


def evaluation_table(record: EvaluationRecord) -> Table:
    """Clean and worst-case accuracy by radius, with intervals, and what each attack contributed."""
    title = f"{record.model_name}: {record.num_images} images, {record.norm}, suite {record.suite}"
    table = Table("eps", "accuracy [95 % interval]", "attacks: images turned / tried", title=title)
    table.add_row("0", str(record.clean), "clean")
    for worst in record.worst_case:
        found = [_found(a) for a in record.attacks if a.eps == worst.eps]
        table.add_row(f"{worst.eps:.4g}", str(worst.robust), "\n".join(found), end_section=True)
    return table


def comparison_table(records: Sequence[EvaluationRecord]) -> Table:
    """Clean and worst-case accuracy of several networks, a column each."""
    first = records[0]
    table = Table(
        "eps", *(r.model_name for r in records), title=f"Accuracy in % [95 % interval], {first.num_images} images"
    )
    table.add_row("0 (clean)", *(_cell(r.clean.value, r.clean.low, r.clean.high) for r in records))
    for i, worst in enumerate(first.worst_case):
        cells = [r.worst_case[i].robust for r in records]
        table.add_row(f"{worst.eps:.3g}", *(_cell(c.value, c.low, c.high) for c in cells))
    return table


def verdict_text(record: EvaluationRecord) -> Text:
    """What the checks say, a line per reason, and what everything cost."""
    verdict = record.verdict
    text = Text("verdict: ").append(verdict.status, style=f"bold {STYLES[verdict.status]}")
    passed = sum(c.outcome == "passed" for c in verdict.checks)
    skipped = [c.name for c in verdict.checks if c.outcome == "skipped"]
    unseen = f", nothing to look at: {', '.join(skipped)}" if skipped else ""
    text.append(f" ({passed} of {len(verdict.checks)} checks passed{unseen})" if verdict.checks else "")
    for reason in verdict.reasons:
        text.append(f"\n  {reason}")
    text.append(f"\npasses: {record.forward_passes:,} images forward, {record.backward_passes:,} backward")
    return text


def _found(result: AttackResult) -> str:
    """What an attack did, on one line."""
    left_out = [f"{result.skipped} skipped"] if result.skipped else []
    left_out += [f"{result.failed} failed"] if result.failed else []
    return f"{result.attack} {result.misclassified}/{result.attacked}" + (
        f" ({', '.join(left_out)})" if left_out else ""
    )


def _cell(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} [{100 * low:.0f}, {100 * high:.0f}]"
