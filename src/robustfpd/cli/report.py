"""`robustfpd report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from robustfpd.errors import InputError, unknown_name

if TYPE_CHECKING:
    from robustfpd.cli.output import Output
    from robustfpd.report.page import Report
    from robustfpd.report.sources import Source


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    /,
    out: Path | None = None,
    suite: str | None = None,
    norm: Literal["linf", "l2", "l1"] | None = None,
    title: str | None = None,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Write what was found as one page to read and send: report.html, with report.md and report.csv beside it.

    For example `robustfpd report runs/digits-mini`,
    or `robustfpd report runs/mnist-mini runs/mnist-mini-baseline --suite standard`.

    Several runs are compared side by side; the baseline joins by itself where it was trained and evaluated too.

    Args:
        runs: run folders, networks by name (see `robustfpd models`), folders of evaluations, or single records.
        out: the page; default report.html in the first run's folder, comparison.html for several.
        suite: which evaluation to show; default the strongest that the runs share.
        norm: which evaluation to show; default the strongest that the runs share.
        title: heading of the page.
        json: print one JSON object instead: the files and the numbers.
        quiet: print nothing but errors.
    """
    from robustfpd.cli.output import Output

    if not runs:
        raise InputError("name what to report on: robustfpd report RUN")
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out must be an .html file, found {out}; the .md and .csv go beside it")
    from robustfpd.config import SUITES
    from robustfpd.report.paths import check_place

    if suite is not None and suite not in SUITES:
        raise unknown_name("suite", suite, SUITES)
    for run in runs:
        check_place(run)
    from robustfpd.report.page import report_on
    from robustfpd.report.sources import read
    from robustfpd.report.write import write_report

    sources = [read(run) for run in runs]
    if len(sources) == 1:
        sources += _baseline(sources[0])
    made = report_on(sources, title=title, suite=suite, norm=norm)
    page = out or sources[0].home / ("report.html" if len(runs) == 1 else "comparison.html")
    files = write_report(page, made)
    output = Output(json=json, quiet=quiet)
    _tell(output, made, files)
    output.result({"files": [str(f) for f in files], "problems": list(made.problems), "runs": _numbers(made)})


def _baseline(source: Source) -> list[Source]:
    """The baseline, where it was trained beside the run, or comes with robustfpd, and was evaluated."""
    from robustfpd.models import zoo
    from robustfpd.report.sources import read

    folder = Path(source.name)
    adversarial = folder.name == "adversarial"
    run = folder.parent if adversarial else folder
    beside = run.with_name(f"{run.name}-baseline") / ("adversarial" if adversarial else "")
    named = source.name.replace("fpd", "baseline")
    found = []
    if (beside / "config.yaml").is_file():
        found = [read(beside)]
    elif named != source.name and {source.name, named} <= set(zoo.names()):
        found = [read(named)]
    kinds = {(e.record.suite, e.record.norm, e.record.data_sha256) for e in source.evaluations}
    return [
        baseline for baseline in found
        if kinds & {(e.record.suite, e.record.norm, e.record.data_sha256) for e in baseline.evaluations}
    ]  # fmt: skip


def _tell(output: Output, made: Report, files: list[Path]) -> None:
    from robustfpd.report.page import SAID, comparison_sentence, verdict_sentence

    if made.first is not None:
        verdict = made.first.record.verdict
        output.explain(f"{verdict.status}: {verdict_sentence(made.first.record)} {SAID[verdict.status]}")
        for reason in verdict.reasons:
            output.explain(f"- {reason}")
        compared = comparison_sentence([c.record for c in made.columns])
        if compared:
            output.explain(compared)
    for problem in made.problems:
        output.explain(f"note: {problem}")
    output.say(f"report: {files[0]}, also as {files[1].name} and {files[2].name}")


def _numbers(made: Report) -> list[dict[str, object]]:
    return [
        {
            "name": c.name, "suite": c.record.suite, "norm": c.record.norm, "clean_accuracy": c.record.clean_accuracy,
            "robust_accuracy": {repr(w.eps): w.robust.value for w in c.record.worst_case},
            "verdict": c.record.verdict.status,
        }
        for c in made.columns
    ]  # fmt: skip
