"""Content of a report: which evaluations it shows, its sentences, and how the runs differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from robustfpd.errors import InputError, unknown_name
from robustfpd.evaluation import EvaluationRecord
from robustfpd.evaluation.checks import contradictions
from robustfpd.evaluation.robustness import NORM_NAMES, BaselineAccuracy, Robustness, format_eps
from robustfpd.report.metrics import class_name, worst_case_confusion
from robustfpd.report.sources import Source, StoredEvaluation, evaluation_command, flatten, training_command

STATUS_SENTENCES = {
    "trusted": "No check found a reason to doubt the robust accuracy. This is not an answer to whether it is high.",
    "suspect": "Do not rely on the robust accuracy: a check found evidence that it is too high.",
    "broken": "The robust accuracy means nothing: a check failed.",
}
MAX_CONFUSIONS = 10


@dataclass(frozen=True)
class Column:
    """One network of the report, and the evaluation that is compared with the others'."""

    source: Source
    evaluation: StoredEvaluation

    @property
    def record(self) -> EvaluationRecord:
        """The evaluation's record."""
        return self.evaluation.record

    @property
    def name(self) -> str:
        """Name of the network in tables and figures."""
        return self.record.model_name


@dataclass(frozen=True)
class Report:
    """Content of the page and the CSV."""

    title: str
    sources: tuple[Source, ...]
    columns: tuple[Column, ...]
    """Networks with an evaluation; the first is the subject of the report."""
    problems: tuple[str, ...]
    """Missing and damaged files, and limits of the comparison."""

    @property
    def first(self) -> Column | None:
        """The subject of the report."""
        return self.columns[0] if self.columns else None


def report_on(
    sources: Sequence[Source], *, title: str | None = None, suite: str | None = None, norm: str | None = None
) -> Report:
    """Choose the evaluation of each run to show: one that most runs share, and of these the strongest.

    Args:
        sources: the subject of the report, and runs to compare it with.
        title: heading; default the names of the first runs.
        suite: show evaluations with this suite.
        norm: show evaluations in this norm.

    Raises:
        InputError: runs were evaluated, but none with that suite and norm.
    """
    sources = _judged(sources)
    problems = [problem for source in sources for problem in source.problems]
    matching = [
        [e for e in s.evaluations if suite in (None, e.record.suite) and norm in (None, e.record.norm)] for s in sources
    ]
    if not any(matching) and any(s.evaluations for s in sources):
        raise _no_match(sources, suite, norm)
    kinds = [{_kind(e) for e in evaluations} for evaluations in matching]
    candidates = next((evaluations for evaluations in matching if evaluations), [])
    best = min(candidates, key=lambda e: (-sum(_kind(e) in k for k in kinds), e.strength), default=None)
    columns = []
    for source, evaluations in zip(sources, matching, strict=True):
        if best is None:
            break
        comparable = [e for e in evaluations if _kind(e) == _kind(best)]
        # False sorts before True: the same images first.
        comparable.sort(key=lambda e: e.record.data_sha256 != best.record.data_sha256)
        if comparable:
            columns.append(Column(source, comparable[0]))
            problems += comparable[0].problems
        else:
            problems.append(
                f"{source.name} has no evaluation with suite {best.record.suite} in {best.record.norm} to compare"
            )
    problems += _limits(columns)
    names = [c.name for c in columns] or [s.name for s in sources]
    heading = title or " and ".join(names[:3]) + (" and others" if len(names) > 3 else "")
    return Report(heading, tuple(sources), tuple(columns), tuple(problems))


def _judged(sources: Sequence[Source]) -> list[Source]:
    """Return the sources with each record compared with the others of the same weights."""
    stored = [(e.path.resolve(), e.record) for source in sources for e in source.evaluations]

    def judged(evaluation: StoredEvaluation) -> StoredEvaluation:
        others = [(path.stem, record) for path, record in stored if path != evaluation.path.resolve()]
        others = list(contradictions.comparable(evaluation.record, others))
        # A record's own check may have seen records that this report does not show.
        return replace(evaluation, record=contradictions.judged(evaluation.record, others)) if others else evaluation

    return [replace(source, evaluations=tuple(map(judged, source.evaluations))) for source in sources]


def _kind(evaluation: StoredEvaluation) -> tuple[str, str]:
    return evaluation.record.suite, evaluation.record.norm


def _no_match(sources: Sequence[Source], suite: str | None, norm: str | None) -> InputError:
    records = [e.record for s in sources for e in s.evaluations]
    suites = sorted({r.suite for r in records})
    if suite is not None and suite not in suites:
        return unknown_name("suite among the evaluations", suite, suites)
    requested = " ".join([*([f"with suite {suite}"] if suite else []), *([f"in norm {norm}"] if norm else [])])
    known = ", ".join(sorted({f"{r.suite} in {r.norm}" for r in records}))
    return InputError(f"no evaluation {requested}; there are: {known}")


def _limits(columns: Sequence[Column]) -> list[str]:
    """Return how the other columns' evaluations differ from the first's."""
    problems = []
    for other in columns[1:]:
        if other.record.data_sha256 != columns[0].record.data_sha256:
            problems.append(f"{other.name} was attacked on other images than {columns[0].name}: compare with care")
        if [w.eps for w in other.record.worst_case] != [w.eps for w in columns[0].record.worst_case]:
            problems.append(f"{other.name} was attacked at other radii than {columns[0].name}")
    return problems


def robustness_of(column: Column, columns: Sequence[Column]) -> Robustness:
    """Return how robust a network is, beside its undefended baseline's robust accuracy if `columns` have it."""
    record, config = column.record, column.source.config
    eps = record.worst_case[-1].eps
    if config is None or config.model.defence == "none":
        return record.robustness
    for other in columns:
        undefended = other.source.config is not None and other.source.config.model.defence == "none"
        robust = next((w.robust for w in other.record.worst_case if w.eps == eps), None)
        if undefended and robust is not None and _same_images(record, other.record):
            baseline = BaselineAccuracy(name=other.name, accuracy=robust.value, low=robust.low, high=robust.high)
            return record.robustness.model_copy(update={"baseline": baseline})
    return record.robustness


def _same_images(a: EvaluationRecord, b: EvaluationRecord) -> bool:
    return (a.data_sha256, a.norm) == (b.data_sha256, b.norm)


def verdict_sentence(record: EvaluationRecord) -> str:
    """Return the result in one sentence."""
    worst = record.worst_case[-1]
    if worst.eps == 0:
        count = f"{worst.robust} of {record.num_images:,} images"
        return f"{record.model_name} classifies {count} correctly without an attack."
    if not record.complete:
        return (
            f"{record.model_name} classifies at most {worst.robust} of {record.num_images:,} images correctly under "
            f"the attacks of suite {record.suite} within {NORM_NAMES[record.norm]} {format_eps(worst.eps)}: an upper "
            "bound, because the evaluation ended early."
        )
    return (
        f"{record.model_name} classifies {worst.robust} of {record.num_images:,} images correctly under all attacks of "
        f"suite {record.suite} within {NORM_NAMES[record.norm]} {format_eps(worst.eps)}."
    )


def comparison_sentence(records: Sequence[EvaluationRecord]) -> str | None:
    """Return how the first network compares with the best of the others, at the radius where they differ most.

    Others are those that were attacked on the same images at common radii; without any, returns None.
    """
    first = records[0]
    robust = {w.eps: w.robust for w in first.under_attack}
    pairs = {
        other.model_name: [(w.eps, robust[w.eps], w.robust) for w in other.under_attack if w.eps in robust]
        for other in records[1:]
        if other.data_sha256 == first.data_sha256
    }
    pairs = {name: common for name, common in pairs.items() if common}
    if not pairs:
        return None
    gains = {name: sum(b.value - a.value for _, a, b in common) / len(common) for name, common in pairs.items()}
    best = max(gains, key=lambda name: gains[name])
    eps, a, b = max(pairs[best], key=lambda point: abs(point[1].value - point[2].value))
    if a.low <= b.high and b.low <= a.high:
        relation = "no clear difference: the intervals overlap"
    else:
        more = "more" if a.value > b.value else "less"
        relation = f"{more} robust by {100 * abs(a.value - b.value):.0f} points"
    other = f"the best other network, {best}," if len(pairs) > 1 else best
    return (
        f"Where they differ most, at eps {format_eps(eps)}, {first.model_name} reaches {a} and {other} {b}: {relation}."
    )


def frequent_confusions(record: EvaluationRecord) -> list[tuple[str, str, int]]:
    """Return the most frequent mistakes under attack: true class, predicted class, number of images."""
    counts = worst_case_confusion(record)
    mistakes = [(int(n), i, j) for (i, j), n in np.ndenumerate(counts) if i != j and n]
    ranked = sorted(mistakes, key=lambda m: (-m[0], m[1], m[2]))[:MAX_CONFUSIONS]
    return [(class_name(record, i), class_name(record, j), n) for n, i, j in ranked]


def repeat_commands(column: Column) -> list[str]:
    """Return the commands that repeat a run: as typed where recorded, else derived from its settings and record."""
    source, record, commands = column.source, column.record, []
    if source.environment.get("command"):
        commands.append(str(source.environment["command"]))
    elif source.config is not None and source.history:
        try:
            commands.append(training_command(source.config, source.name))
        except InputError as error:
            commands.append(f"# {error}")
    if record.environment.get("command"):
        commands.append(str(record.environment["command"]))
    elif source.config is not None:
        commands.append(evaluation_command(record, source.config, source.name))
    return list(dict.fromkeys(commands))


def differing_settings(sources: Sequence[Source]) -> list[tuple[str, list[str]]]:
    """Return settings by dotted name that are not equal in all runs, with their values."""
    flat = [flatten(s.config.model_dump(mode="json")) if s.config is not None else {} for s in sources]
    names = list(dict.fromkeys(name for values in flat for name in values))
    rows = [(name, [str(values.get(name, "")) for values in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]
