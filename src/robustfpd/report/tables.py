"""Tables of results: for a terminal, and as CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from robustfpd.evaluation import AttackResult, EvaluationRecord
from robustfpd.report.metrics import attack_metrics

STATUS_STYLES = {"trusted": "green", "suspect": "yellow", "broken": "red"}
COLUMNS = (
    "run", "suite", "norm", "eps", "attack", "images", "attacked", "misclassified", "accuracy", "low", "high",
    "median_norm", "median_queries", "passes", "seconds", "failed", "skipped", "verdict",
)  # fmt: skip
"""Of the CSV."""


def evaluation_table(record: EvaluationRecord) -> Table:
    """Return clean and worst-case accuracy by radius with intervals, and each attack's result."""
    title = f"{record.model_name}: {record.num_images} images, {record.norm}, suite {record.suite}"
    table = Table("eps", "accuracy [95 % interval]", "attacks: images misclassified / attacked", title=title)
    table.add_row("0", str(record.clean), "clean")
    for worst in record.worst_case:
        results = [_result(a) for a in record.attacks if a.eps == worst.eps]
        table.add_row(f"{worst.eps:.4g}", str(worst.robust), "\n".join(results), end_section=True)
    return table


def comparison_table(records: Sequence[EvaluationRecord]) -> Table:
    """Return clean and worst-case accuracy of several networks, a column each."""
    first = records[0]
    title = f"Accuracy in % [95 % interval], {first.num_images} images"
    table = Table("eps", *(r.model_name for r in records), title=title)
    rows = [("0 (clean)", [r.clean for r in records])]
    rows += [(f"{w.eps:.3g}", [r.worst_case[i].robust for r in records]) for i, w in enumerate(first.worst_case)]
    for eps, cells in rows:
        table.add_row(eps, *(f"{100 * p.value:.1f} [{100 * p.low:.0f}, {100 * p.high:.0f}]" for p in cells))
    return table


def verdict_text(record: EvaluationRecord) -> Text:
    """Return the verdict with a line per reason, and the number of passes."""
    verdict = record.verdict
    passed = sum(c.outcome == "passed" for c in verdict.checks)
    skipped = [c.name for c in verdict.checks if c.outcome == "skipped"]
    not_applicable = f", not applicable: {', '.join(skipped)}" if skipped else ""
    text = Text("verdict: ").append(verdict.status, style=f"bold {STATUS_STYLES[verdict.status]}")
    text.append(f" ({passed} of {len(verdict.checks)} checks passed{not_applicable})")
    for reason in verdict.reasons:
        text.append(f"\n  {reason}")
    return text.append(f"\npasses: {record.forward_passes:,} images forward, {record.backward_passes:,} backward")


def csv_text(records: Iterable[tuple[str, EvaluationRecord]]) -> str:
    """Return CSV with a row per run, radius and attack; `clean` and `worst case` count as attacks.

    Args:
        records: names of the runs and their records. Accuracies are fractions of all images.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for name, record in records:
        common = {
            "run": name, "suite": record.suite, "norm": record.norm, "images": record.num_images,
            "verdict": record.verdict.status,
        }  # fmt: skip
        totals = [("clean", 0.0, record.clean), *(("worst case", w.eps, w.robust) for w in record.worst_case)]
        for attack, eps, p in totals:
            writer.writerow({**common, "attack": attack, "eps": eps, "accuracy": p.value, "low": p.low, "high": p.high})
        for metrics in attack_metrics(record):
            writer.writerow({**common, **dataclasses.asdict(metrics)})
    return buffer.getvalue()


def _result(result: AttackResult) -> str:
    left_out = [f"{n} {what}" for n, what in ((result.skipped, "skipped"), (result.failed, "failed")) if n]
    note = f" ({', '.join(left_out)})" if left_out else ""
    return f"{result.attack} {result.misclassified}/{result.attacked}{note}"
