"""`robustfpd report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from robustfpd.cli.common import Output, check_choice
from robustfpd.errors import InputError

if TYPE_CHECKING:
    from robustfpd.report.page import Report
    from robustfpd.report.sources import Source


def report(
    runs: tyro.conf.Positional[tuple[Path, ...]] = (),
    /,
    out: Path | None = None,
    suite: str | None = None,
    norm: Literal["linf", "l2", "l1"] | None = None,
    title: str | None = None,
    output: Output = Output(),  # noqa: B008
) -> None:
    """Write a self-contained HTML report of evaluations, report.html, and a CSV file, report.csv.

    For example `robustfpd report runs/digits-mini`,
    or `robustfpd report runs/mnist-mini runs/mnist-mini-baseline --suite standard`.

    Several runs are compared side by side. A run's baseline is added if it was trained and evaluated.

    Args:
        runs: run folders, networks by name (see `robustfpd models`), folders of evaluations, or single records.
        out: the page; default report.html in the first run's folder, comparison.html for several.
        suite: which evaluation to show; default the strongest that the runs share.
        norm: which evaluation to show; default the strongest that the runs share.
        title: heading of the page.
    """
    if not runs:
        raise InputError("name a run to report on: robustfpd report RUN")
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out must be an .html file, found {out}; the .csv is written beside it")
    from robustfpd.config import SUITES
    from robustfpd.report.paths import resolve

    if suite is not None:
        check_choice("suite", suite, SUITES)
    for run in runs:
        resolve(run)
    from robustfpd.report.html import write_report
    from robustfpd.report.page import report_on, robustness_of
    from robustfpd.report.sources import read

    sources = [read(run) for run in runs]
    if len(sources) == 1:
        sources += _baseline(sources[0])
    made = report_on(sources, title=title, suite=suite, norm=norm)
    page = out or sources[0].home / ("report.html" if len(runs) == 1 else "comparison.html")
    files = write_report(page, made)
    _print_summary(output, made, files)
    numbers = [
        {
            "name": c.name, "suite": c.record.suite, "norm": c.record.norm, "clean_accuracy": c.record.clean_accuracy,
            "robust_accuracy": {repr(w.eps): w.robust.value for w in c.record.worst_case},
            "verdict": c.record.verdict.status, "headline": c.record.headline,
            "robustness": robustness_of(c, made.columns).model_dump(mode="json"),
        }
        for c in made.columns
    ]  # fmt: skip
    output.print_result({"files": [str(f) for f in files], "problems": list(made.problems), "runs": numbers})


def _baseline(source: Source) -> list[Source]:
    """Return the baseline of a run or of a zoo network, if it was evaluated on the same images."""
    from robustfpd.report.paths import resolve
    from robustfpd.report.sources import read

    folder = Path(source.name)
    adversarial = folder.name == "adversarial"
    run = folder.parent if adversarial else folder
    beside = run.with_name(f"{run.name}-baseline") / ("adversarial" if adversarial else "")
    name = str(beside) if (beside / "config.yaml").is_file() else resolve(source.name).baseline
    if name is None:
        return []
    baseline = read(name)
    kinds = {(e.record.suite, e.record.norm, e.record.data_sha256) for e in source.evaluations}
    common = kinds & {(e.record.suite, e.record.norm, e.record.data_sha256) for e in baseline.evaluations}
    return [baseline] if common else []


def _print_summary(output: Output, made: Report, files: list[Path]) -> None:
    from robustfpd.report.metrics import answers_text
    from robustfpd.report.page import comparison_sentence, robustness_of, verdict_sentence

    if made.first is not None:
        output.print_wrapped(verdict_sentence(made.first.record))
        output.print(answers_text(made.first.record, robustness_of(made.first, made.columns)))
        compared = comparison_sentence([c.record for c in made.columns])
        if compared:
            output.print_wrapped(compared)
    for problem in made.problems:
        output.print_wrapped(f"note: {problem}")
    output.print(f"report: {files[0]}, also as {files[1].name}")
