"""The report as Markdown, to paste, and as CSV, to compute with."""

from __future__ import annotations

import csv
import dataclasses
import io
import re

from robustfpd.report.metrics import NORMS, radius
from robustfpd.report.page import SAID, Column, Report, commands, comparison_sentence, verdict_sentence

COLUMNS = (
    "run", "suite", "norm", "eps", "attack", "images", "tried", "turned", "accuracy", "low", "high", "median_norm",
    "median_queries", "passes", "seconds", "failed", "skipped", "verdict",
)  # fmt: skip

MARK = "<!-- robustfpd report -->"
"""How the Markdown begins, so that it is told from other files."""


def markdown(report: Report) -> str:
    """The report without its pictures."""
    first = report.first
    parts = [MARK, f"# {_plain(report.title)}"]
    if first is None:
        parts.append("There is no evaluation to report on.")
    else:
        verdict = first.record.verdict
        parts.append(f"**{verdict.status}**: {_plain(verdict_sentence(first.record))} {SAID[verdict.status]}")
        parts += ["\n".join(f"- {_plain(reason)}" for reason in verdict.reasons)] if verdict.reasons else []
        compared = comparison_sentence([c.record for c in report.columns])
        parts += [_plain(compared)] if compared else []
        parts.append(_accuracy(report))
        parts += [_attacks(column) for column in report.columns]
        parts.append(_checks(first))
    if report.problems:
        parts.append("## What is missing here\n\n" + "\n".join(f"- {_plain(problem)}" for problem in report.problems))
    typed = [line for c in report.columns for line in commands(c.source, c.evaluated)]
    fence = "`" * max([3, *(1 + len(run) for line in typed for run in re.findall("`+", line))])
    parts += [f"## To repeat this\n\n{fence}sh\n" + "\n".join(typed) + f"\n{fence}"] if typed else []
    return "\n\n".join(parts) + "\n"


def table(report: Report) -> str:
    """One row per run, radius and attack; `clean` and `worst case` count as attacks. Fractions of all images."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for column in report.columns:
        record = column.record
        same = {
            "run": column.name, "suite": record.suite, "norm": record.norm, "images": record.num_images,
            "verdict": record.verdict.status,
        }  # fmt: skip
        for attack, eps, p in (
            ("clean", 0.0, record.clean),
            *(("worst case", w.eps, w.robust) for w in record.worst_case),
        ):
            writer.writerow({**same, "attack": attack, "eps": eps, "accuracy": p.value, "low": p.low, "high": p.high})
        for line in column.lines:
            writer.writerow({**same, **dataclasses.asdict(line)})
    return buffer.getvalue()


def _accuracy(report: Report) -> str:
    radii = sorted({w.eps for c in report.columns for w in c.record.worst_case})
    robust = [{w.eps: str(w.robust) for w in c.record.worst_case} for c in report.columns]
    rows = [["0 (clean)", *(str(c.record.clean) for c in report.columns)]]
    rows += [[radius(eps), *(found.get(eps, "") for found in robust)] for eps in radii]
    assert report.first is not None
    return "## Accuracy under the worst attack\n\n" + _grid(
        [f"eps ({NORMS[report.first.record.norm]})", *(c.name for c in report.columns)], rows
    )


def _attacks(column: Column) -> str:
    kind = "accuracy alone" if column.record.every_attack else "accuracy left"
    head = ["attack", "eps", "tried", "turned", kind, "median norm", "median queries", "passes"]
    rows = [
        [
            line.attack, radius(line.eps), str(line.tried), str(line.turned), f"{100 * line.accuracy:.1f} %",
            _number(line.median_norm), _number(line.median_queries), f"{line.passes:,}",
        ]
        for line in column.lines
    ]  # fmt: skip
    return f"## Attacks on {_plain(column.name)}\n\n" + _grid(head, rows)


def _checks(column: Column) -> str:
    checks = column.record.verdict.checks
    if not checks:
        return "## Checks\n\nNone."
    return "## Checks\n\n" + _grid(["check", "outcome", "evidence"], [[c.name, c.outcome, c.evidence] for c in checks])


def _grid(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Names as text: on one line, no tags."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
