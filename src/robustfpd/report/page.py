"""What a report says, before it becomes a page: which evaluations, the verdict in one sentence, what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from robustfpd.errors import InputError, unknown_name
from robustfpd.evaluation import EvaluationRecord
from robustfpd.evaluation.gallery import gallery_folder
from robustfpd.report import figures
from robustfpd.report.commands import evaluation_command, training_command
from robustfpd.report.metrics import NORMS, AttackLine, attack_lines, class_name, confusion_counts, radius
from robustfpd.report.sources import Evaluated, Source
from robustfpd.report.thumbnails import BUDGET, ThumbnailGallery, thumbnails

SAID = {
    "trusted": "No check found a reason to doubt this number.",
    "suspect": "Do not rely on this number yet: a check found something against it.",
    "broken": "This number means nothing: a check failed.",
}
CONFUSED = 10


@dataclass(frozen=True)
class Column:
    """One network of the report, with the evaluation that the others are compared in."""

    source: Source
    evaluated: Evaluated

    @property
    def name(self) -> str:
        """What tables and curves call it."""
        return self.evaluated.record.model_name

    @property
    def record(self) -> EvaluationRecord:
        """What was measured."""
        return self.evaluated.record

    @property
    def lines(self) -> list[AttackLine]:
        """Its attacks."""
        return attack_lines(self.record)

    @property
    def left_out(self) -> bool:
        """Whether some attack skipped images, or failed on some."""
        return any(a.skipped or a.failed for a in self.record.attacks)


@dataclass(frozen=True)
class Report:
    """Everything that pages, Markdown and CSV are made of."""

    title: str
    sources: tuple[Source, ...]
    columns: tuple[Column, ...]
    """Those that were evaluated; the first is what the report is about."""
    problems: tuple[str, ...]
    """What is missing, and what was left out."""

    @property
    def first(self) -> Column | None:
        """What the report is about."""
        return self.columns[0] if self.columns else None


def report_on(
    sources: Sequence[Source], *, title: str | None = None, suite: str | None = None, norm: str | None = None
) -> Report:
    """Choose the evaluation to show of each run: one that all share if there is one, and of these the strongest.

    Args:
        sources: the run that the report is about, and others beside it.
        title: heading; default the first run's name.
        suite: show this suite's evaluation.
        norm: show this norm's.

    Raises:
        InputError: runs were evaluated, but none with that suite and norm.
    """
    problems = [problem for source in sources for problem in source.problems]
    fitting = [
        [e for e in s.evaluations if suite in (None, e.record.suite) and norm in (None, e.record.norm)] for s in sources
    ]
    if not any(fitting) and any(s.evaluations for s in sources):
        _refuse(sources, suite, norm)
    kinds = [{_kind(e) for e in found} for found in fitting]
    shown = next((found for found in fitting if found), [])
    best = min(shown, key=lambda e: (-sum(_kind(e) in k for k in kinds), e.strength), default=None)
    columns = []
    for source, found in zip(sources, fitting, strict=True):
        same = [e for e in found if best is not None and _kind(e) == _kind(best)]
        same.sort(key=lambda e: best is None or e.record.data_sha256 != best.record.data_sha256)
        if same:
            columns.append(Column(source, same[0]))
            problems += same[0].problems
        elif best is not None:
            problems.append(
                f"{source.name} has no evaluation with suite {best.record.suite} in {best.record.norm} to be compared"
            )
    problems += _differing(columns)
    names = [c.name for c in columns] or [s.name for s in sources]
    heading = title or " and ".join(names[:3]) + (" and others" if len(names) > 3 else "")
    return Report(heading, tuple(sources), tuple(columns), tuple(problems))


def _kind(evaluated: Evaluated) -> tuple[str, str]:
    return evaluated.record.suite, evaluated.record.norm


def _refuse(sources: Sequence[Source], suite: str | None, norm: str | None) -> None:
    there = [e.record for s in sources for e in s.evaluations]
    if suite is not None and suite not in {r.suite for r in there}:
        raise unknown_name("suite among the evaluations", suite, sorted({r.suite for r in there}))
    known = ", ".join(sorted({f"{r.suite} in {r.norm}" for r in there}))
    asked = " ".join([*([f"with suite {suite}"] if suite else []), *([f"in norm {norm}"] if norm else [])])
    raise InputError(f"no evaluation {asked}; there are: {known}")


def _differing(columns: Sequence[Column]) -> list[str]:
    """What makes columns hard to compare."""
    found = []
    for other in columns[1:]:
        if other.record.data_sha256 != columns[0].record.data_sha256:
            found.append(f"{other.name} was attacked on other images than {columns[0].name}: compare with care")
        if [w.eps for w in other.record.worst_case] != [w.eps for w in columns[0].record.worst_case]:
            found.append(f"{other.name} was attacked at other radii than {columns[0].name}")
    return found


def verdict_sentence(record: EvaluationRecord) -> str:
    """The result in one sentence."""
    worst = record.worst_case[-1]
    return (
        f"{record.model_name} classifies {worst.robust} of {record.num_images:,} images correctly whatever suite "
        f"{record.suite} did within {NORMS[record.norm]} {radius(worst.eps)}."
    )


def comparison_sentence(records: Sequence[EvaluationRecord]) -> str | None:
    """How the first network does against the best of the others where they differ most; None where none compares.

    Others are those that were attacked on the same images, at radii that the first one was attacked at as well.
    """
    first = records[0]
    ours = {w.eps: w.robust for w in first.worst_case}
    pairs = {
        other.model_name: [(w.eps, ours[w.eps], w.robust) for w in other.worst_case if w.eps in ours]
        for other in records[1:]
        if other.data_sha256 == first.data_sha256
    }
    pairs = {name: shared for name, shared in pairs.items() if shared}
    if not pairs:
        return None
    gains = {name: sum(b.value - a.value for _, a, b in shared) / len(shared) for name, shared in pairs.items()}
    rival = max(gains, key=lambda name: gains[name])
    eps, mine, theirs = max(pairs[rival], key=lambda at: abs(at[1].value - at[2].value))
    if mine.low <= theirs.high and theirs.low <= mine.high:
        relation = "no clear difference: the intervals overlap"
    else:
        more = "more" if mine.value > theirs.value else "less"
        relation = f"{more} robust by {100 * abs(mine.value - theirs.value):.0f} points"
    best = "the best rival, " if len(pairs) > 1 else ""
    return (
        f"Where they differ most, at eps {radius(eps)}, {first.model_name} keeps {mine} and {best}{rival}, {theirs}: "
        f"{relation}."
    )


def confusions(record: EvaluationRecord) -> list[tuple[str, str, int]]:
    """The commonest mistakes under attack: true class, class, images."""
    counts = confusion_counts(record)
    pairs = [
        (int(counts[i, j]), i, j) for i in range(len(counts)) for j in range(len(counts)) if i != j and counts[i, j]
    ]  # fmt: skip
    ranked = sorted(pairs, key=lambda p: (-p[0], p[1], p[2]))[:CONFUSED]
    return [(class_name(record, i), class_name(record, j), n) for n, i, j in ranked]


def drawn(report: Report) -> dict[str, Any]:
    """The report's figures as SVG, and its gallery; what there is nothing to draw of is None."""
    histories = {_name(s, report): s.history for s in report.sources if s.history}
    planned = {
        _name(s, report): s.config.procedure.epochs if s.config else len(s.history) for s in report.sources if s.history
    }
    training = figures.training_curves(histories, planned) if histories else None
    found: dict[str, Any] = {"training": training, "gallery": None}
    first = report.first
    if first is None:
        return found
    record, shown = first.record, first.evaluated.shown
    counts = confusion_counts(record) if record.ledger else None
    names = [] if counts is None else [class_name(record, i) for i in range(len(counts))]
    pictures: ThumbnailGallery | None = None
    if shown is not None:
        pictures = thumbnails(gallery_folder(first.evaluated.path), shown, record, BUDGET)
    return found | {
        "accuracy": figures.accuracy_curves([c.record for c in report.columns], [c.name for c in report.columns]),
        "attacks": [(c.name, figures.attack_curves(c.record, str(i))) for i, c in enumerate(report.columns)],
        "confusion": None if counts is None else figures.confusion(counts, names),
        "gallery": pictures,
        "surface": None if shown is None or shown.landscape is None else figures.loss_landscape(shown.landscape),
    }


def _name(source: Source, report: Report) -> str:
    return next((c.name for c in report.columns if c.source is source), source.name)


def commands(source: Source, evaluated: Evaluated | None) -> list[str]:
    """What repeats a run: as it was typed where that is known, else told from what it left behind."""
    found, config = [], source.config
    if source.environment.get("command"):
        found.append(str(source.environment["command"]))
    elif config is not None and source.history:
        found.append(_or_why(training_command, config, source.name))
    if evaluated is not None and evaluated.record.environment.get("command"):
        found.append(str(evaluated.record.environment["command"]))
    elif evaluated is not None and config is not None:
        found.append(_or_why(evaluation_command, evaluated.record, config, source.name))
    return list(dict.fromkeys(found))


def _or_why(command: Callable[..., str], *given: Any) -> str:
    """A command, or why there is none, as a comment."""
    try:
        return command(*given)
    except InputError as error:
        return f"# {error}"


def settings_that_differ(sources: Sequence[Source]) -> list[tuple[str, list[str]]]:
    """Settings by dotted name with their value in each run, where not all are alike."""
    flat = [_flat(s.config.model_dump(mode="json")) if s.config is not None else {} for s in sources]
    names = list(dict.fromkeys(name for values in flat for name in values))
    rows = [(name, [str(values.get(name, "")) for values in flat]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
