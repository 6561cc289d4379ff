from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from robustfpd.evaluation import Check, EvaluationRecord, Proportion, Verdict, WorstCase, evaluate
from robustfpd.evaluation.robustness import best_published, guessing_accuracy, level

if TYPE_CHECKING:
    from pathlib import Path

    from tests.evaluation.conftest import Data, Linear

N = 200


def _level(robust: int, clean: int = 190, images: int = N, **changes: Any) -> str:
    proportion = Proportion.of(robust, images)
    values = {"eps": 0.1, "guessing": 0.1, "status": "trusted", **changes}
    return level(robust=proportion.value, low=proportion.low, clean=clean / images, images=images, **values)


def _with(record: EvaluationRecord, robust: int, check: Check | None = None) -> EvaluationRecord:
    """Return the record with `robust` robust images of the first radius, and this check as its verdict."""
    worst = WorstCase(eps=record.worst_case[0].eps, robust=Proportion.of(robust, record.num_images))
    checks = () if check is None else (check,)
    return record.model_copy(update={"worst_case": (worst,), "verdict": Verdict.of(checks)})


@pytest.fixture
def record(linear: Linear, data: Data) -> EvaluationRecord:
    return evaluate(linear, data, suite="first-look", eps=0.2)


@pytest.mark.parametrize(
    ("robust", "clean", "expected"),
    [
        (0, 190, "not robust"), (47, 190, "not robust"), (48, 190, "partly robust"),  # a quarter of 190 is 47.5
        (142, 190, "partly robust"), (143, 190, "robust"),  # three quarters are 142.5
        (113, 113, "partly robust"), (114, 114, "robust"),  # the interval leaves a half
        (28, 60, "not robust"), (29, 60, "partly robust"),  # the interval leaves a tenth
        (0, 0, "not robust"),
    ],
)  # fmt: skip
def test_the_borders_of_the_levels(robust: int, clean: int, expected: str) -> None:
    assert _level(robust, clean) == expected


def test_few_images_give_no_answer_unless_they_are_misclassified() -> None:
    assert _level(1, 1, images=1, guessing=1.0) == "unknown"
    assert _level(0, 1, images=1, guessing=1.0) == "not robust"
    assert _level(3, 3, images=3, guessing=0.4) == "partly robust"
    assert _level(3, 3, images=3, guessing=0.5) == "unknown"


def test_survivors_of_an_unreliable_measurement_count_for_nothing() -> None:
    assert [_level(190, status=s) for s in ("trusted", "suspect", "broken")] == ["robust", "unknown", "unknown"]
    assert [_level(2, status=s) for s in ("trusted", "suspect", "broken")] == ["not robust", "not robust", "unknown"]


def test_nothing_is_robust_at_radius_0() -> None:
    assert _level(190, eps=0.0) == "unknown"


def test_without_classes_guessing_counts_as_0() -> None:
    assert _level(29, 60, guessing=None) == "partly robust"
    assert _level(28, 60, guessing=None) == "partly robust"


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [([0, 1, 2, 3], 10, 0.25), ([0, 1, 2, 3, 4] * 4, 4, 0.2), ([], 4, 0.25), ([], 0, None), ([1, 1, 1, 0], 0, 0.75)],
)  # fmt: skip
def test_guessing_is_one_class_or_the_most_frequent(labels: list[int], classes: int, expected: float | None) -> None:
    assert guessing_accuracy(labels, classes) == expected


def test_the_best_published_number_is_that_of_data_set_norm_and_radius() -> None:
    mnist = best_published("mnist", "linf", 3 / 10)
    assert mnist is not None
    assert (mnist.accuracy, mnist.source) == (0.9634, "Gowal et al., 2020")
    assert best_published("cifar10", "linf", 8 / 255) is not None
    assert best_published("mnist", "linf", 0.1) is None
    assert best_published("mnist", "l2", 0.3) is None
    assert best_published("", "linf", 0.3) is None


def test_the_headline_answers_both_questions(record: EvaluationRecord) -> None:
    reliable = "The measurement is reliable."
    assert _with(record, 1).headline == f"Robust accuracy 1.7 % at L∞ 0.2: not robust. {reliable}"
    assert _with(record, 50).headline == f"Robust accuracy 83.3 % at L∞ 0.2: robust. {reliable}"
    check = Check(name="more-steps", outcome="suspicious", evidence="8 of 8")
    suspect = "measurement is not reliable (more-steps: 8 of 8). Do not rely on this number."
    assert _with(record, 50, check).headline == f"Robust accuracy at most 83.3 % at L∞ 0.2: the {suspect}"
    assert _with(record, 1, check).headline == f"Robust accuracy at most 1.7 % at L∞ 0.2: not robust. The {suspect}"
    failed = check.model_copy(update={"outcome": "failed"})
    assert _with(record, 1, failed).headline == f"Robust accuracy at most 1.7 % at L∞ 0.2: the {suspect}"


def test_a_record_has_both_answers_in_memory_and_in_its_file(record: EvaluationRecord, tmp_path: Path) -> None:
    import json

    robustness = record.robustness
    assert robustness.guessing == record.guessing
    assert robustness.guessing is not None
    assert robustness.guessing >= 0.5
    assert robustness.accuracy == record.robust_accuracy
    path = record.save(tmp_path / "r.json")
    values = json.loads(path.read_text())
    assert values["headline"] == record.headline
    assert values["robustness"]["level"] == robustness.level
    assert EvaluationRecord.load(path) == record


def test_a_record_of_an_earlier_version_has_its_guessing_from_the_ledger(
    record: EvaluationRecord, tmp_path: Path
) -> None:
    import json

    path = record.save(tmp_path / "r.json")
    new = ("headline", "robustness", "dataset", "guessing", "certified_accuracy")
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in new}
    path.write_text(json.dumps(values))
    older = EvaluationRecord.load(path)
    assert (older.guessing, older.dataset, older.certified_accuracy) == (None, "", ())
    assert older.robustness == record.robustness
    assert older.model_copy(update={"ledger": ()}).robustness.guessing is None


def test_the_data_set_gives_the_best_published_number(linear: Linear, data: Data) -> None:
    record = evaluate(linear, data, suite="first-look", eps=0.3, dataset="mnist")
    assert record.robustness.published == best_published("mnist", "linf", 0.3)
    assert record.robustness.level == "not robust"
