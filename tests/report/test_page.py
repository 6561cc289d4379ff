from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from robustfpd.config import RunConfig, recipe
from robustfpd.errors import InputError
from robustfpd.evaluation import EvaluationRecord, Proportion, WorstCase
from robustfpd.evaluation.robustness import format_eps
from robustfpd.report.metrics import worst_case_confusion
from robustfpd.report.page import (
    Column,
    Report,
    comparison_sentence,
    differing_settings,
    frequent_confusions,
    repeat_commands,
    report_on,
    robustness_of,
    verdict_sentence,
)
from robustfpd.report.sources import Source, StoredEvaluation

if TYPE_CHECKING:
    from tests.report.conftest import MakeRecord, MakeSource


def _with(source: Source, *evaluations: StoredEvaluation) -> Source:
    return dataclasses.replace(source, evaluations=tuple(sorted(evaluations, key=lambda e: e.strength)))


def _evaluated(make_record: MakeRecord, name: str, **values: object) -> StoredEvaluation:
    return StoredEvaluation(Path(f"{name}.json"), make_record(name, **values), None)


def _shown(report: Report) -> list[tuple[str, str, str]]:
    return [(c.name, c.record.suite, c.record.norm) for c in report.columns]


def test_the_strongest_evaluation_is_shown(make_source: MakeSource, make_record: MakeRecord) -> None:
    kinds = [("quick", "linf"), ("standard", "linf"), ("first-look", "l2")]
    run = _with(make_source("a"), *(_evaluated(make_record, "a", suite=s, norm=n) for s, n in kinds))
    assert _shown(report_on([run])) == [("a", "standard", "linf")]
    assert _shown(report_on([run], suite="quick")) == [("a", "quick", "linf")]
    assert _shown(report_on([run], norm="l2")) == [("a", "first-look", "l2")]


def test_of_several_runs_the_evaluation_that_they_share(make_source: MakeSource, make_record: MakeRecord) -> None:
    first = _with(
        make_source("a"), _evaluated(make_record, "a", suite="standard"), _evaluated(make_record, "a", suite="quick")
    )
    second = _with(make_source("b"), _evaluated(make_record, "b", suite="quick"))
    third = _with(make_source("c"), _evaluated(make_record, "c", suite="full"))
    report = report_on([first, second, third])
    assert _shown(report) == [("a", "quick", "linf"), ("b", "quick", "linf")]
    assert [p for p in report.problems if p.startswith("c has no evaluation with suite quick")]


def test_other_images_and_radii_are_problems(make_source: MakeSource) -> None:
    other = make_source("b", (100,), data_sha256="f" * 64)
    problems = report_on([make_source("a"), other]).problems
    assert problems == (
        "b was attacked on other images than a: compare with care", "b was attacked at other radii than a",
    )  # fmt: skip
    assert report_on([make_source("a"), make_source("b")]).problems == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suite": "quik"}, r"suite among the evaluations 'quik'.*did you mean 'quick'"),
        ({"norm": "l1"}, "no evaluation in norm l1; there are: quick in linf"),
    ],
)
def test_a_suite_or_norm_without_an_evaluation_is_refused(
    make_source: MakeSource, options: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        report_on([make_source("a")], **options)


def test_records_of_the_same_weights_that_contradict_each_other_are_broken(
    make_source: MakeSource, make_record: MakeRecord
) -> None:
    kinds: list[dict[str, object]] = [
        {"suite": "quick", "robust": (100, 60)}, {"suite": "standard", "robust": (150, 60)},
    ]  # fmt: skip
    stored = [
        StoredEvaluation(Path(f"{i}.json"), make_record("a", weights_sha256="w", **kind), None)
        for i, kind in enumerate(kinds)
    ]
    report = report_on([_with(make_source("a"), *stored)])
    assert {e.record.verdict.status for e in report.sources[0].evaluations} == {"broken"}
    assert report.columns[0].record.suite == "standard"
    assert "is above" in report.columns[0].record.headline
    others = [s.model_copy(update={"weights_sha256": w}) for s, w in zip((e.record for e in stored), "xy", strict=True)]
    apart = [StoredEvaluation(e.path, record, None) for e, record in zip(stored, others, strict=True)]
    assert report_on([_with(make_source("a"), *apart)]).columns[0].record == others[1]


def test_the_baseline_s_robust_accuracy_stands_beside_the_network_s(make_source: MakeSource) -> None:
    undefended = RunConfig().baseline()
    sources = [
        make_source("FPD"),
        make_source("other"),
        dataclasses.replace(make_source("plain", (40, 9)), config=undefended),
    ]
    columns = report_on(sources).columns
    baseline = robustness_of(columns[0], columns).baseline
    assert baseline is not None
    assert (baseline.name, baseline.accuracy) == ("plain", 9 / 200)
    assert robustness_of(columns[2], columns).baseline is None
    elsewhere = dataclasses.replace(make_source("plain", (40, 9), data_sha256="f" * 64), config=undefended)
    columns = report_on([sources[0], elsewhere]).columns
    assert robustness_of(columns[0], columns).baseline is None


def test_runs_without_an_evaluation_make_a_report_too(make_source: MakeSource) -> None:
    bare = dataclasses.replace(make_source("a"), evaluations=(), problems=("a was not evaluated",))
    report = report_on([bare])
    assert (report.first, report.title, report.problems) == (None, "a", ("a was not evaluated",))
    assert report_on([bare], suite="quick").first is None


def test_the_verdict_in_one_sentence(make_record: MakeRecord) -> None:
    record = make_record("net", (150, 60))
    robust = Proportion.of(60, 200)
    text = f"net classifies {robust} of 200 images correctly under all attacks of suite quick within L∞ 0.2."
    assert verdict_sentence(record) == text


@pytest.mark.parametrize(
    ("eps", "text"),
    [(0.1, "0.1"), (8 / 255, "8/255"), (0.3, "0.3"), (1.5, "1.5"), (1 / 255, "1/255")],
)  # fmt: skip
def test_eps_as_text(eps: float, text: str) -> None:
    assert format_eps(eps) == text


def test_comparison_of_clear_differences(make_record: MakeRecord) -> None:
    a, b, c = make_record("A", (150, 60)), make_record("B", (140, 10)), make_record("C", (20, 5))
    assert comparison_sentence([a, c, b]) == (
        f"Where they differ most, at eps 0.2, A reaches {Proportion.of(60, 200)} and the best other network, "
        f"B, {Proportion.of(10, 200)}: more robust by 25 points."
    )
    assert str(comparison_sentence([b, a])).endswith(
        f"B reaches {Proportion.of(10, 200)} and A {Proportion.of(60, 200)}: less robust by 25 points."
    )
    assert comparison_sentence([a]) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "clear"), [(100, 99, False), (100, 100, False), (110, 91, False), (115, 86, True)]
)
def test_overlapping_intervals_are_no_clear_difference(
    make_record: MakeRecord, ours: int, theirs: int, clear: bool
) -> None:
    a, b = Proportion.of(ours, 200), Proportion.of(theirs, 200)
    assert clear == (b.high < a.low)
    for first, second in ((ours, theirs), (theirs, ours)):
        sentence = str(comparison_sentence([make_record("A", (first,)), make_record("B", (second,))]))
        assert ("no clear difference: the intervals overlap" in sentence) is not clear
        assert ("points" in sentence) is clear


def test_only_radii_that_all_have_are_compared(make_record: MakeRecord) -> None:
    ours = make_record("A", (150, 10))
    other = make_record("B", (100,))
    assert "at eps 0.1," in str(comparison_sentence([ours, other]))
    apart = other.model_copy(update={"worst_case": (WorstCase(eps=0.7, robust=Proportion.of(1, 200)),)})
    assert comparison_sentence([ours, apart]) is None
    elsewhere = other.model_copy(update={"data_sha256": "f" * 64})
    assert comparison_sentence([ours, elsewhere]) is None
    third = make_record("C", (90,))
    assert "and the best other network, B," in str(comparison_sentence([ours, third, other]))
    assert "and C " in str(comparison_sentence([ours, third, elsewhere]))


def test_commands_as_typed_or_from_settings_and_record(make_source: MakeSource, make_record: MakeRecord) -> None:
    run = dataclasses.replace(make_source("runs/digits-mini"), config=recipe("digits/mini", ["training.epochs=2"]))
    trained, attacked = repeat_commands(Column(run, run.evaluations[0]))
    assert trained == "robustfpd train digits/mini training.epochs=2 --out runs/digits-mini"
    assert attacked.startswith("robustfpd evaluate runs/digits-mini --suite quick --norm linf --eps 0.1 0.2")
    typed = dataclasses.replace(run, environment={"command": "robustfpd train x"})
    record = make_record("x", environment={"command": "robustfpd evaluate x"})
    evaluation = StoredEvaluation(Path("x"), record, None)
    assert repeat_commands(Column(typed, evaluation)) == ["robustfpd train x", "robustfpd evaluate x"]
    own = dataclasses.replace(run, config=RunConfig(recipe="mine.yaml"))
    assert repeat_commands(Column(own, evaluation))[0].startswith("# recipe 'mine.yaml' is not a packaged one")


def test_settings_that_differ_are_named_with_their_values(make_source: MakeSource) -> None:
    runs = [make_source("a"), make_source("b")]
    assert differing_settings(runs) == [("recipe", ["recipe of a", "recipe of b"])]
    assert differing_settings(runs[:1]) == []


def test_the_most_frequent_mistakes_come_first(measured_record: EvaluationRecord) -> None:
    confusions = frequent_confusions(measured_record)
    counts = [n for *_, n in confusions]
    assert counts == sorted(counts, reverse=True)
    true, predicted, n = confusions[0]
    assert worst_case_confusion(measured_record)[int(true[-1]), int(predicted[-1])] == n
    assert true != predicted
