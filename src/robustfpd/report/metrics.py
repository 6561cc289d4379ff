"""What a record says beyond its numbers: accuracy after each attack, and which class was taken for which."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from robustfpd.evaluation import EvaluationRecord, LedgerRow
from robustfpd.evaluation.ledger import CLEAN

NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1"}


@dataclass(frozen=True)
class AttackLine:
    """One attack at one radius, as tables show it."""

    attack: str
    eps: float
    tried: int
    turned: int
    accuracy: float
    """Under this attack alone where it tried every image; else after it and all attacks before it."""
    median_norm: float | None
    """Of the perturbations that turned an image, from the ledger; None without one, and where none was turned."""
    median_queries: float | None
    """Forward passes per image that it turned; None where it turned none."""
    passes: int
    """Images forward and backward."""
    seconds: float
    failed: int
    skipped: int


def attack_lines(record: EvaluationRecord) -> list[AttackLine]:
    """All attacks in the order in which they were run."""
    rows: dict[tuple[str, float], list[LedgerRow]] = {}
    for row in record.ledger:
        rows.setdefault((row.attack, row.eps), []).append(row)
    standing, lines = record.clean.count, []
    for result in record.attacks:
        standing -= result.misclassified
        mine = rows.get((result.attack, result.eps), [])
        norms = [r.distance for r in mine if fell(r)]
        queries = [r.queries for r in mine if fell(r) and r.queries]
        alone = result.accuracy.value if result.accuracy is not None else standing / record.num_images
        lines.append(
            AttackLine(
                result.attack, result.eps, result.attacked, result.misclassified, alone,
                statistics.median(norms) if norms else None,
                statistics.median(queries) if queries else result.median_queries,
                result.forward_passes + result.backward_passes, result.seconds, result.failed, result.skipped,
            )
        )  # fmt: skip
    return lines


def after_each_attack(record: EvaluationRecord) -> dict[str, list[tuple[float, float]]]:
    """Accuracy by attack and radius, as `AttackLine.accuracy` has it; fractions."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in attack_lines(record):
        curves.setdefault(line.attack, []).append((line.eps, line.accuracy))
    return curves


def final_predictions(record: EvaluationRecord) -> list[tuple[int, int]]:
    """True class and class under the worst attack, of every image; empty where the ledger is not there."""
    found: dict[int, tuple[int, int]] = {}
    for row in record.ledger:
        if row.attack == CLEAN:
            found[row.image] = row.label, row.clean_prediction
        elif fell(row) and found.get(row.image, (row.label, row.label)) == (row.label, row.label):
            found[row.image] = row.label, row.adversarial_prediction
    return list(found.values())


def fell(row: LedgerRow) -> bool:
    """Whether the attack found an adversarial example."""
    return row.outcome == "misclassified"


def confusion_counts(record: EvaluationRecord) -> npt.NDArray[np.int64]:
    """Images by true class (rows) and class under the worst attack (columns)."""
    pairs = final_predictions(record)
    classes = max([len(record.class_names), *(1 + max(pair) for pair in pairs)])
    counts = np.zeros((classes, classes), dtype=np.int64)
    for label, prediction in pairs:
        counts[label, prediction] += 1
    return counts


def class_name(record: EvaluationRecord, number: int) -> str:
    """What a class is called."""
    return record.class_names[number] if number < len(record.class_names) else str(number)


def radius(eps: float) -> str:
    """A radius as people say it: 0.1, or 8/255."""
    levels = eps * 255
    whole = abs(levels - round(levels)) < 1e-6 and len(f"{eps:.6g}") > 5
    return f"{round(levels)}/255" if whole else f"{eps:.4g}"
