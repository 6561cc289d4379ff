from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from robustfpd.evaluation import AttackResult, EvaluationRecord, LedgerRow, Proportion, WorstCase
from robustfpd.report.metrics import attack_metrics, class_name, worst_case_confusion

if TYPE_CHECKING:
    from tests.report.conftest import MakeRecord


def _row(image: int, label: int, clean: int, attack: str, eps: float, predicted: int, **others: Any) -> LedgerRow:
    """A line of a ledger."""
    outcome = "misclassified" if predicted != label else "robust"
    return LedgerRow(
        image=image, label=label, clean_prediction=clean, attack=attack, eps=eps, adversarial_prediction=predicted,
        distance=others.pop("distance", eps), **{"outcome": outcome, "margin": 0.0, **others},
    )  # fmt: skip


LEDGER = (
    _row(0, 1, 1, "clean", 0.0, 1), _row(1, 2, 0, "clean", 0.0, 0), _row(2, 0, 0, "clean", 0.0, 0),
    _row(3, 2, 2, "clean", 0.0, 2),
    _row(0, 1, 1, "FGSM", 0.1, 1, queries=2), _row(2, 0, 0, "FGSM", 0.1, 1, queries=2, distance=0.08),
    _row(3, 2, 2, "FGSM", 0.1, 2, queries=2),
    _row(0, 1, 1, "PGD", 0.1, 2, queries=10, distance=0.1), _row(3, 2, 2, "PGD", 0.1, 2, queries=30),
)  # fmt: skip


def _result(attack: str, attacked: int, misclassified: int) -> AttackResult:
    return AttackResult(
        attack=attack, eps=0.1, attacked=attacked, misclassified=misclassified, seconds=1.0, forward_passes=40
    )


@pytest.fixture
def record(make_record: MakeRecord) -> EvaluationRecord:
    return make_record(
        "net", clean=3, ledger=LEDGER, every_attack=False,
        attacks=(), worst_case=(WorstCase(eps=0.1, robust=Proportion.of(1, 4)),),
    ).model_copy(update={
        "clean": Proportion.of(3, 4), "attacks": (_result("FGSM", 3, 1), _result("PGD", 2, 1)),
    })  # fmt: skip


def test_accuracy_after_each_attack_counts_down(record: EvaluationRecord) -> None:
    first, second = attack_metrics(record)
    assert (first.accuracy, second.accuracy) == (0.5, 0.25)
    assert (first.median_norm, second.median_norm) == (0.08, 0.1)
    assert (first.median_queries, second.median_queries) == (2, 10)
    assert second.accuracy == record.worst_case[-1].robust.value


def test_an_attack_on_every_image_has_its_own_accuracy(make_record: MakeRecord) -> None:
    lines = attack_metrics(make_record("net", (150,)))
    assert [line.accuracy for line in lines] == [150 / 200, 151 / 200]
    assert [line.median_norm for line in lines] == [None, None]


def test_the_last_line_of_a_real_record_is_its_worst_case(measured_record: EvaluationRecord) -> None:
    for worst in measured_record.worst_case:
        last = [line for line in attack_metrics(measured_record) if line.result.eps == worst.eps][-1]
        assert last.accuracy == pytest.approx(worst.robust.value)


def test_each_image_has_the_class_of_its_first_successful_attack(record: EvaluationRecord) -> None:
    assert np.array_equal(worst_case_confusion(record), [[0, 1, 0], [0, 0, 1], [1, 0, 1]])


def test_the_diagonal_of_the_confusion_counts_robust_images(measured_record: EvaluationRecord) -> None:
    counts = worst_case_confusion(measured_record)
    assert counts.shape == (10, 10)
    assert counts.sum() == measured_record.num_images
    assert np.trace(counts) == measured_record.worst_case[-1].robust.count
    assert class_name(measured_record, 3) == "digit 3"
    assert class_name(measured_record, 12) == "12"
