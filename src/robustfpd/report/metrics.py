"""Metrics of an evaluation record, and tables of them: for a terminal, and as CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.table import Table
from rich.text import Text
from sklearn.metrics import confusion_matrix

from robustfpd.evaluation import AttackResult, EvaluationRecord, LedgerRow, WorstCase
from robustfpd.evaluation.checks import NOT_MADE
from robustfpd.evaluation.ledger import CLEAN
from robustfpd.evaluation.robustness import Robustness

STATUS_STYLES = {"trusted": "bold", "suspect": "bold yellow", "broken": "bold red"}
"""Of the verdict on the measurement: green belongs to a robust model."""
LEVEL_STYLES = {"robust": "bold green", "partly robust": "bold", "not robust": "bold red", "unknown": "bold"}
COLUMNS = (
    "run", "suite", "norm", "eps", "attack", "images", "attacked", "misclassified", "accuracy", "low", "high",
    "median_norm", "median_queries", "passes", "seconds", "failed", "skipped", "verdict",
)  # fmt: skip
"""Of the CSV."""


@dataclass(frozen=True)
class AttackMetrics:
    """One attack at one radius."""

    result: AttackResult
    accuracy: float
    """Under this attack alone if it was run on every image, else after it and all attacks before it; in [0, 1]."""
    median_norm: float | None
    """Of the perturbations that cause a misclassification; None without such an image or without a ledger."""
    median_queries: float | None
    """Forward passes per misclassified image; None where there is none."""
    passes: int
    """Forward and backward passes, in images."""


def attack_metrics(record: EvaluationRecord) -> list[AttackMetrics]:
    """Return the metrics of all attacks in the order in which they ran."""
    rows: dict[tuple[str, float], list[LedgerRow]] = {}
    for row in record.ledger:
        if row.outcome == "misclassified":
            rows.setdefault((row.attack, row.eps), []).append(row)
    survivors, metrics = record.clean.count, []
    for result in record.attacks:
        survivors -= result.misclassified
        successes = rows.get((result.attack, result.eps), [])
        queries = [row.queries for row in successes if row.queries]
        metrics.append(
            AttackMetrics(
                result,
                accuracy=survivors / record.num_images if result.accuracy is None else result.accuracy.value,
                median_norm=statistics.median(row.distance for row in successes) if successes else None,
                median_queries=statistics.median(queries) if queries else result.median_queries,
                passes=result.forward_passes + result.backward_passes,
            )
        )
    return metrics


def worst_case_confusion(record: EvaluationRecord) -> npt.NDArray[np.int64]:
    """Return the number of images by true class (rows) and class under the first successful attack (columns).

    A robust image has its clean prediction.
    """
    predictions: dict[int, tuple[int, int]] = {}
    for row in record.ledger:
        if row.attack == CLEAN:
            predictions[row.image] = row.label, row.clean_prediction
        elif row.outcome == "misclassified" and predictions[row.image][1] == row.label:
            predictions[row.image] = row.label, row.adversarial_prediction
    classes = max(len(record.class_names), *(1 + max(pair) for pair in predictions.values()))
    true, predicted = zip(*predictions.values(), strict=True)
    counts: npt.NDArray[np.int64] = confusion_matrix(true, predicted, labels=range(classes))
    return counts


def class_name(record: EvaluationRecord, number: int) -> str:
    """Return the name of a class, or its number where the name is unknown."""
    return record.class_names[number] if number < len(record.class_names) else str(number)


def evaluation_table(record: EvaluationRecord) -> Table:
    """Return clean and worst-case accuracy by radius with intervals, and each attack's result."""
    title = f"{record.model_name}: {record.num_images} images, {record.norm}, suite {record.suite}"
    title += "" if record.complete else "; the evaluation ended early: accuracies are upper bounds"
    table = Table("eps", "accuracy [95 % interval]", "attacks: images misclassified / attacked", title=title)
    table.add_row("0", str(record.clean), "clean")
    for worst in record.under_attack:
        results = [_result(a) for a in record.attacks if a.eps == worst.eps]
        table.add_row(f"{worst.eps:.4g}", str(worst.robust), "\n".join(results), end_section=True)
    return table


def comparison_table(records: Sequence[EvaluationRecord]) -> Table:
    """Return clean and worst-case accuracy of several networks, a column each."""
    first = records[0]
    title = f"Accuracy in % [95 % interval], {first.num_images} images"
    table = Table("eps", *(r.model_name for r in records), title=title)
    rows = [("0 (clean)", [r.clean for r in records])]
    rows += [(f"{w.eps:.3g}", [r.under_attack[i].robust for r in records]) for i, w in enumerate(first.under_attack)]
    for eps, cells in rows:
        table.add_row(eps, *(f"{100 * p.value:.1f} [{100 * p.low:.0f}, {100 * p.high:.0f}]" for p in cells))
    table.add_section()
    table.add_row("robust?", *(_level_text(r.robustness) for r in records))
    table.add_row("reliable?", *(Text(r.verdict.status, STATUS_STYLES[r.verdict.status]) for r in records))
    return table


def answers_text(record: EvaluationRecord, robustness: Robustness | None = None) -> Text:
    """Return the headline, and the answers to "is the model robust?" and "is the measurement reliable?".

    Args:
        record: the evaluation.
        robustness: default the record's; a report's has the baseline.
    """
    robustness = robustness or record.robustness
    text = Text(f"{record.headline}\n\n", style="bold")
    lines = Text("Is the model robust? ", style="").append_text(_level_text(robustness))
    lines.append("".join(f"\n  {name}: {value}" for name, value in reference_accuracies(record, robustness)))
    forward, backward = (passes / record.num_images for passes in (record.forward_passes, record.backward_passes))
    lines.append(f"\n  cost: {forward:,.0f} forward and {backward:,.0f} backward passes per image, checks included")
    return Text("").append_text(text).append_text(lines).append("\n").append_text(verdict_text(record))


def reference_accuracies(record: EvaluationRecord, robustness: Robustness) -> list[tuple[str, str]]:
    """Return the robust accuracy and what it compares with, as names and texts."""
    worst = record.worst_case[-1]
    rows = [("robust accuracy", str(worst.robust))]
    if worst.missed_at_most:
        rows.append(("with the audit", audit_text(worst)))
    rows.append(("clean accuracy", str(record.clean)))
    if robustness.guessing is not None:
        rows.append(("guessing", f"{100 * robustness.guessing:.1f} %"))
    if robustness.baseline is not None:
        b = robustness.baseline
        rows.append(("baseline", f"{100 * b.accuracy:.1f} % [{100 * b.low:.1f}, {100 * b.high:.1f}] ({b.name})"))
    if robustness.published is not None:
        published = robustness.published
        rows.append(("best published", f"{100 * published.accuracy:.2f} % ({published.source})"))
    return rows


def audit_text(worst: WorstCase) -> str:
    """Return the interval with what the audit allows to be missed, and where it comes from."""
    (low, high), survivors = worst.interval, worst.robust.count
    audited = "no survivor was drawn at random; "
    if worst.audited:
        audited = (
            f"every attack was also run on {worst.audited} of the {survivors} survivors, drawn at random, and found "
        )
        audited += "nothing; "
    return (
        f"[{100 * low:.1f}, {100 * high:.1f}]: {audited}at most {worst.missed_at_most} survivors have an adversarial "
        "example that one of the attacks that skipped them would find (95 % confidence)"
    )


def verdict_text(record: EvaluationRecord) -> Text:
    """Return the verdict on the measurement, and evidence and fix of each check that failed or is suspicious."""
    verdict = record.verdict
    passed = sum(c.outcome == "passed" for c in verdict.checks)
    skipped = [c.name for c in verdict.checks if c.outcome == "skipped" and c.evidence != NOT_MADE]
    not_applicable = f", not applicable: {', '.join(skipped)}" if skipped else ""
    text = Text("Is the measurement reliable? ").append(verdict.status, style=STATUS_STYLES[verdict.status])
    text.append(f" ({passed} of {len(verdict.checks)} checks passed{not_applicable})")
    unsettled = [c for c in verdict.checks if c.outcome in ("failed", "suspicious")]
    for check in sorted(unsettled, key=lambda c: c.outcome):  # failed ones first
        text.append(f"\n  {check.name}: {check.evidence}")
        if check.fix:
            text.append(f"\n    → {check.fix}", style="bold")
    return text


def csv_text(records: Iterable[EvaluationRecord]) -> str:
    """Return CSV with a row per record, radius and attack; accuracies are fractions of all images.

    The attacks `clean` and `worst case` stand for no attack and for all of them.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n", restval="", extrasaction="ignore")
    writer.writeheader()
    for record in records:
        common = {
            "run": record.model_name, "suite": record.suite, "norm": record.norm, "images": record.num_images,
            "verdict": record.verdict.status,
        }  # fmt: skip
        totals = [("clean", 0.0, record.clean), *(("worst case", w.eps, w.robust) for w in record.under_attack)]
        for attack, eps, p in totals:
            writer.writerow({**common, "attack": attack, "eps": eps, "accuracy": p.value, "low": p.low, "high": p.high})
        for metrics in attack_metrics(record):
            writer.writerow({**common, **vars(metrics.result), **vars(metrics)})
    return buffer.getvalue()


def _level_text(robustness: Robustness) -> Text:
    return Text(robustness.level, LEVEL_STYLES[robustness.level])


def _result(result: AttackResult) -> str:
    counts = (result.skipped, "skipped"), (result.failed, "failed"), (result.not_attacked, "not attacked")
    left_out = [f"{n} {what}" for n, what in counts if n]
    note = f" ({', '.join(left_out)})" if left_out else ""
    return f"{result.attack} {result.misclassified}/{result.attacked}{note}"
