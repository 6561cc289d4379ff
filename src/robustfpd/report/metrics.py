"""Metrics of an evaluation record: accuracy and cost per attack, confusion under attack."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import confusion_matrix

from robustfpd.evaluation import EvaluationRecord, LedgerRow
from robustfpd.evaluation.ledger import CLEAN

NORM_NAMES = {"linf": "L∞", "l2": "L2", "l1": "L1"}


@dataclass(frozen=True)
class AttackMetrics:
    """One attack at one radius."""

    attack: str
    eps: float
    attacked: int
    misclassified: int
    accuracy: float
    """Under this attack alone if it was run on every image, else after it and all attacks before it; in [0, 1]."""
    median_norm: float | None
    """Of the perturbations that cause a misclassification; None without such an image or without a ledger."""
    median_queries: float | None
    """Forward passes per misclassified image; None where there is none."""
    passes: int
    """Forward and backward passes, in images."""
    seconds: float
    failed: int
    skipped: int


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
                attack=result.attack, eps=result.eps, attacked=result.attacked, misclassified=result.misclassified,
                accuracy=survivors / record.num_images if result.accuracy is None else result.accuracy.value,
                median_norm=statistics.median(row.distance for row in successes) if successes else None,
                median_queries=statistics.median(queries) if queries else result.median_queries,
                passes=result.forward_passes + result.backward_passes, seconds=result.seconds, failed=result.failed,
                skipped=result.skipped,
            )
        )  # fmt: skip
    return metrics


def accuracy_by_attack(record: EvaluationRecord) -> dict[str, list[tuple[float, float]]]:
    """Return points (eps, `AttackMetrics.accuracy`) by attack."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for metrics in attack_metrics(record):
        curves.setdefault(metrics.attack, []).append((metrics.eps, metrics.accuracy))
    return curves


def worst_case_predictions(record: EvaluationRecord) -> list[tuple[int, int]]:
    """Return the true class and the class under the first successful attack of every image.

    A robust image has its clean prediction. Without a ledger the list is empty.
    """
    predictions: dict[int, tuple[int, int]] = {}
    for row in record.ledger:
        if row.attack == CLEAN:
            predictions[row.image] = row.label, row.clean_prediction
        elif row.outcome == "misclassified" and predictions[row.image][1] == row.label:
            predictions[row.image] = row.label, row.adversarial_prediction
    return list(predictions.values())


def worst_case_confusion(record: EvaluationRecord) -> npt.NDArray[np.int64]:
    """Return the number of images by true class (rows) and class under the worst attack (columns)."""
    pairs = worst_case_predictions(record)
    classes = max([len(record.class_names), *(1 + max(pair) for pair in pairs)])
    true, predicted = zip(*pairs, strict=True)
    counts: npt.NDArray[np.int64] = confusion_matrix(true, predicted, labels=range(classes))
    return counts


def class_name(record: EvaluationRecord, number: int) -> str:
    """Return the name of a class, or its number where the name is unknown."""
    return record.class_names[number] if number < len(record.class_names) else str(number)


def format_eps(eps: float) -> str:
    """Return a radius as text: `0.1`, or `8/255`."""
    levels = eps * 255
    is_level = abs(levels - round(levels)) < 1e-6 and len(f"{eps:.6g}") > 5
    return f"{round(levels)}/255" if is_level else f"{eps:.4g}"
