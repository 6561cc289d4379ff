"""Records that contradict each other, or a certificate, are not reliable."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from robustfpd.errors import InputError
from robustfpd.evaluation import Check, EvaluationRecord, LedgerRow, Proportion, Verdict, WorstCase, evaluate
from robustfpd.evaluation.checks import contradictions
from robustfpd.evaluation.checks.contradictions import judged, read_beside
from robustfpd.evaluation.inputs import check_certified

if TYPE_CHECKING:
    from tests.evaluation.conftest import Data, Linear

N = 100
RANDOM = Check(name="randomised-outputs", outcome="suspicious", evidence="random")


def _record(
    lost: Mapping[float, Collection[int]], suite: str = "standard", wrong: Collection[int] = (), **changes: Any
) -> EvaluationRecord:
    """Return a record of 100 images.

    Args:
        lost: images that are misclassified under the attack, by radius.
        suite: the suite.
        wrong: images that are misclassified without it.
        changes: other fields.
    """

    def row(image: int, attack: str, eps: float, correct: bool) -> LedgerRow:
        return LedgerRow(
            image=image, label=0, clean_prediction=int(image in wrong), attack=attack, eps=eps, distance=eps, margin=0,
            adversarial_prediction=int(not correct), outcome="robust" if correct else "misclassified",
        )  # fmt: skip

    rows, worst, gone = [row(i, "clean", 0.0, i not in wrong) for i in range(N)], list[WorstCase](), {*wrong}
    for eps, images in sorted(lost.items()):
        rows += [row(i, "PGD", eps, i not in images) for i in range(N) if i not in gone]
        gone |= {*images}
        worst.append(WorstCase(eps=eps, robust=Proportion.of(N - len(gone), N)))
    values: dict[str, Any] = {
        "model_name": "net", "suite": suite, "norm": "linf", "seed": 0, "batch_size": 1, "batch_size_auto": False,
        "search_precision": "fp32", "every_attack": False, "clean": Proportion.of(N - len(wrong), N),
        "worst_case": tuple(worst), "attacks": (), "ledger": tuple(rows), "data_sha256": "d", "weights_sha256": "w",
        "environment": {}, "verdict": Verdict.of(()), "settings_sha256": "s", **changes,
    }  # fmt: skip
    return EvaluationRecord(**values)


def _check(record: EvaluationRecord, *others: EvaluationRecord) -> Check:
    return contradictions.contradictions(record, [(f"other-{i}", other) for i, other in enumerate(others)])


def test_records_that_agree_pass() -> None:
    strong, weak = _record({0.1: range(20), 0.2: range(50)}), _record({0.1: range(10), 0.3: range(60)}, "quick")
    for a, b in ((strong, weak), (weak, strong)):
        check = _check(a, b)
        assert (check.outcome, check.evidence) == ("passed", "agrees with other-0")


def test_without_anything_to_compare_the_check_is_skipped() -> None:
    record = _record({0.1: range(20)})
    assert _check(record).outcome == "skipped"
    changes: tuple[dict[str, Any], ...] = ({"weights_sha256": "x"}, {"data_sha256": "x"}, {"norm": "l2"})
    for change in changes:
        assert _check(record, _record({0.1: range(90)}, "quick", **change)).outcome == "skipped"
    unknown = _record({0.1: range(20)}, weights_sha256=None)
    assert _check(unknown, _record({0.1: range(90)}, "quick", weights_sha256=None)).outcome == "skipped"


@pytest.mark.parametrize(("certified", "outcome"), [(0.858, "passed"), (0.859, "failed"), (0.75, "passed")])
def test_a_certified_accuracy_above_the_interval_is_a_contradiction(certified: float, outcome: str) -> None:
    record = _record({0.1: range(21)}, certified_accuracy=(certified,))
    assert 0.858 < record.worst_case[0].robust.high < 0.859  # 79 of 100
    check = _check(record)
    assert check.outcome == outcome
    assert ("is below the certified accuracy, 85.9 %" in check.evidence) is (outcome == "failed")


def test_each_radius_has_its_own_certified_accuracy() -> None:
    record = _record({0.1: range(10), 0.2: range(50)}, certified_accuracy=(0.9, 0.2))
    assert _check(record).outcome == "passed"
    assert "at L∞ 0.2 is below" in _check(record.model_copy(update={"certified_accuracy": (0.9, 0.9)})).evidence


def test_a_stronger_suite_must_not_leave_more() -> None:
    strong, weak = _record({0.1: range(20)}), _record({0.1: range(15, 40)}, "quick")
    for record, other in ((strong, weak), (weak, strong)):
        check = _check(record, other)
        assert check.outcome == "failed"
        assert "images robust in the first and misclassified in the second: 20" in check.evidence
        assert check.evidence.index("under standard") < check.evidence.index("under quick")
    assert _check(strong, weak.model_copy(update={"ledger": ()})).outcome == "failed"
    assert "images robust" not in _check(strong, weak.model_copy(update={"ledger": ()})).evidence


def test_an_image_that_only_the_weaker_suite_misclassifies_makes_the_stronger_one_suspicious() -> None:
    strong, weak = _record({0.1: range(20)}), _record({0.1: [3, 50]}, "quick")
    check = _check(strong, weak)
    assert check.outcome == "suspicious"
    assert check.evidence.endswith("images robust in the first and misclassified in the second: 1")
    assert _check(weak, strong).outcome == "passed"


def test_images_are_compared_by_their_position() -> None:
    strong, weak = _record({0.1: range(20)}), _record({0.1: range(10)}, "quick")
    moved = tuple(row.model_copy(update={"image": row.image + 7}) for row in weak.ledger)
    assert _check(strong, weak.model_copy(update={"ledger": moved})).outcome == "passed"


@pytest.mark.parametrize(("suite", "other"), [("quick", "quick"), ("quick", "standard"), ("own", "another")])
def test_a_larger_radius_must_not_leave_more(suite: str, other: str) -> None:
    check = _check(_record({0.2: range(20)}, suite), _record({0.1: range(40)}, other))
    assert check.outcome == "failed"
    assert "at L∞ 0.2 under" in check.evidence.split(" is above ")[0]


def test_a_smaller_radius_that_leaves_less_contradicts_suites_that_are_as_strong() -> None:
    for suite, outcome in (("standard", "failed"), ("full", "failed"), ("quick", "passed")):
        assert _check(_record({0.1: range(40)}), _record({0.2: range(20)}, suite)).outcome == outcome


@pytest.mark.parametrize("suite", ["own", "published", "standard"])
def test_suites_without_an_order_are_not_compared_at_one_radius(suite: str) -> None:
    other = "standard" if suite == "standard" else "quick"
    for counts in ((20, 40), (40, 20)):
        records = [_record({0.1: range(count)}, name) for count, name in zip(counts, (suite, other), strict=True)]
        assert _check(*records).outcome == "passed"


@pytest.mark.parametrize(("found", "outcome"), [(10, "passed"), (11, "suspicious"), (12, "failed")])
def test_standard_must_not_leave_more_than_autoattack(found: int, outcome: str) -> None:
    standard, autoattack = _record({0.1: range(10)}), _record({0.1: range(found)}, "autoattack")
    assert _check(standard, autoattack).outcome == outcome
    assert _check(autoattack, standard).outcome == "passed"
    fewer = _record({0.1: range(5, 30)})  # adaptive attacks may find more, and other images
    assert _check(autoattack, fewer).outcome == "passed"


def test_radii_that_differ_by_rounding_are_equal() -> None:
    smaller = 0.1 * 3 / 3 - 1e-17
    assert _check(_record({0.1: range(20)}), _record({smaller * (1 - 1e-12): range(40)})).outcome == "passed"


def test_clean_accuracies_must_be_equal_but_for_rounding() -> None:
    ours, theirs = _record({0.1: range(20)}), _record({0.1: range(20)}, wrong=[1, 2])
    assert _check(ours, _record({0.1: range(20)}, wrong=[1])).outcome == "passed"
    for record, other in ((ours, theirs), (theirs, ours)):
        check = _check(record, other)
        assert check.outcome == "failed"
        assert "on the same weights and images" in check.evidence


def test_random_outputs_contradict_only_beyond_their_intervals() -> None:
    random = Verdict.of([RANDOM])
    strong = _record({0.1: range(20)}, verdict=random)
    assert _check(strong, _record({0.1: range(30)}, "quick", wrong=[0])).outcome == "passed"
    assert _check(strong, _record({0.1: range(60)}, "quick")).outcome == "failed"
    assert _check(strong, _record({0.1: range(30)}, "quick", wrong=range(20))).outcome == "failed"


def test_the_verdict_is_made_again() -> None:
    record = _record({0.1: range(20)})
    broken = judged(record, [("quick", _record({0.1: range(40)}, "quick"))])
    assert broken.verdict.status == "broken"
    assert broken.verdict.reasons[0].startswith("contradictions: ")
    assert broken.robustness.level == "unknown"
    assert judged(broken, []).verdict.status == "trusted"
    assert len(judged(broken, []).verdict.checks) == 1


def test_only_records_that_can_be_compared_are_read(tmp_path: Path) -> None:
    record, other = _record({0.1: range(20)}), _record({0.1: range(40)}, "quick")
    path = record.save(tmp_path / "record.json")
    other.save(tmp_path / "quick.json")
    other.model_copy(update={"weights_sha256": "x"}).save(tmp_path / "foreign.json")
    damaged = other.save(tmp_path / "no-ledger.json")
    damaged.with_suffix(".ledger.csv").write_text("image\nx\n")
    for name, text in (("empty", ""), ("list", "[1]"), ("half", '{"format": 3'), ("index", '{"norm": "linf"}')):
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "binary.json").write_bytes(b"\x80\x81")
    other.save(tmp_path / "running.json")
    (tmp_path / "running.unfinished.json").write_text("{}")
    found = dict(read_beside(record, path))
    assert sorted(found) == ["no-ledger", "quick"]
    assert found["quick"] == other
    assert found["no-ledger"].ledger == ()


def test_an_evaluation_is_compared_with_those_beside_it(linear: Linear, data: Data, tmp_path: Path) -> None:
    options: dict[str, Any] = {"suite": "first-look", "out_dir": tmp_path}
    first = evaluate(linear, data, eps=0.02, record_name="first", **options)
    assert first.verdict.checks[-1].outcome == "skipped"
    second = evaluate(linear, data, eps=0.03, record_name="second", **options)
    assert (second.verdict.checks[-1].outcome, second.verdict.checks[-1].evidence) == ("passed", "agrees with first")
    none = first.model_copy(update={"worst_case": (WorstCase(eps=0.02, robust=Proportion.of(0, 60)),)})
    none.save(tmp_path / "first.json")
    third = evaluate(linear, data, eps=0.04, record_name="third", **options)
    assert third.verdict.status == "broken"
    assert EvaluationRecord.load(tmp_path / "third.json") == third
    # A finished evaluation is compared again when it is read.
    assert evaluate(linear, data, eps=0.03, record_name="second", **options).verdict.status == "broken"
    assert EvaluationRecord.load(tmp_path / "second.json").verdict.status == "broken"
    assert evaluate(linear, data, suite="first-look", eps=0.04).verdict.checks[-1].outcome == "skipped"


def test_a_certified_accuracy_is_compared_also_with_a_finished_evaluation(
    linear: Linear, data: Data, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"suite": "first-look", "eps": (0.1, 0.02), "out_dir": tmp_path}
    assert evaluate(linear, data, **options).verdict.checks[-1].outcome == "skipped"
    broken = evaluate(linear, data, certified_accuracy=(0.99, 0.1), **options)
    assert broken.certified_accuracy == (0.1, 0.99)
    assert broken.verdict.status == "broken"
    assert "at L∞ 0.1 is below the certified accuracy, 99.0 %" in broken.verdict.reasons[0]
    assert evaluate(linear, data, **options) == broken  # the record keeps it
    assert evaluate(linear, data, certified_accuracy=0.0, **options).verdict.checks[-1].outcome == "passed"


@pytest.mark.parametrize(("given", "eps", "expected"), [
    (None, 0.1, ()), (0.65, 0.1, (0.65,)), ([0.65], (0.3, 0.1), (0.65, 0.65)), ((0.5, 1), (0.3, 0.1), (1.0, 0.5)),
])  # fmt: skip
def test_a_certified_accuracy_is_one_for_all_radii_or_one_for_each(given: Any, eps: Any, expected: Any) -> None:
    radii = tuple(sorted(eps)) if isinstance(eps, tuple) else (eps,)
    assert check_certified(given, eps, radii) == expected


@pytest.mark.parametrize(("given", "message"), [
    (65, r"must be a fraction in \[0, 1\], found 65; 65 % is 0\.65"), (-0.1, "found -0.1"), ("0.6", "found '0'"),
    (True, "found True"), (float("nan"), "found nan"), ((0.1, 0.2, 0.3), "one for each of the 2 radii, found 3"),
    ((), "one for each of the 2 radii, found 0"),
])  # fmt: skip
def test_other_certified_accuracies_are_refused(linear: Linear, data: Data, given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(linear, data, suite="first-look", eps=(0.1, 0.2), certified_accuracy=given)
