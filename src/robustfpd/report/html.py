"""`report.html`, one self-contained page, and its CSV."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markdown_it import MarkdownIt
from markupsafe import Markup

from robustfpd.errors import InputError
from robustfpd.evaluation.gallery import gallery_folder
from robustfpd.evaluation.record import Check
from robustfpd.evaluation.robustness import NORM_NAMES, format_eps
from robustfpd.io import write_text, writing
from robustfpd.report import figures, metrics, page
from robustfpd.report.thumbnails import thumbnails

HERE = Path(__file__).parent
CHECKS = (HERE / "checks.md", HERE.parents[2] / "docs" / "checks.md")
"""The checks' documentation: in an installed package, and in a checkout."""
SEVERITY = {"failed": 0, "suspicious": 1, "passed": 2, "skipped": 3}


def write_report(path: Path, report: page.Report) -> list[Path]:
    """Write the page to `path`, and the CSV beside it; each file is replaced as a whole.

    Returns:
        The paths of the page and of the CSV.

    Raises:
        InputError: `path` is not called .html, cannot be written, or the CSV would replace a file that is no report's.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"a report's page must be an .html file, found {path}; the .csv is written beside it")
    table = path.with_suffix(".csv")
    head = ",".join(metrics.COLUMNS)
    if table.is_file() and not table.read_text(encoding="utf-8", errors="replace").startswith(head):
        raise InputError(f"{table} exists and is not the CSV of a report; choose another name for the page with --out")
    texts = {path: render(report), table: metrics.csv_text(c.record for c in report.columns)}
    for file, text in texts.items():
        with writing(file):
            write_text(file, text)
    return list(texts)


def render(report: page.Report) -> str:
    """Return the page: figures, pictures, styles and script are inside, nothing is loaded."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["quoted"] = _quoted
    records = [c.record for c in report.columns]
    config = report.sources[0].config
    robustness = page.robustness_of(report.columns[0], report.columns) if records else None
    return environment.get_template("report.html").render(
        report=report,
        first=report.first,
        eps=format_eps,
        norms=NORM_NAMES,
        level=lambda level: f"level-{level.replace(' ', '-')}",
        percent=lambda value: f"{100 * value:.1f} %",
        number=lambda value: "" if value is None else f"{value:.4g}",
        attack_metrics=metrics.attack_metrics,
        commands=page.repeat_commands,
        status_sentences=page.STATUS_SENTENCES,
        style=(HERE / "report.css").read_text(encoding="utf-8"),
        script=(HERE / "report.js").read_text(encoding="utf-8"),
        sentence=page.verdict_sentence(records[0]) if records else None,
        robustness=robustness,
        references=robustness and metrics.reference_accuracies(records[0], robustness),
        comparison=page.comparison_sentence(records) if records else None,
        checks=_checks(report.columns),
        meanings=check_meanings(),
        radii=sorted({w.eps for r in records for w in r.under_attack}),
        robust=[{w.eps: w.robust for w in r.under_attack} for r in records],
        others=[e for s in report.sources for e in s.evaluations if all(e is not c.evaluation for c in report.columns)],
        differing=page.differing_settings(report.sources),
        environments=_environments(report.columns),
        config=None if config is None else yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False),
        used_views=[attack.attack.rpartition(", ")[2] for record in records for attack in record.attacks],
        **_figures(report),
    )


@cache
def check_meanings() -> dict[str, str]:
    """Return the entries of docs/checks.md as HTML by the name of the check; empty where the file is missing."""
    path = next((p for p in CHECKS if p.is_file()), None)
    if path is None:
        return {}
    markdown = MarkdownIt("js-default", {"html": False})
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", path.read_text(encoding="utf-8"))  # links lead to other pages
    parts = re.split(r"^### `([a-z-]+)`\n", text, flags=re.MULTILINE)
    texts = (re.split(r"^## ", part, flags=re.MULTILINE)[0] for part in parts[2::2])
    return {name: markdown.render(text) for name, text in zip(parts[1::2], texts, strict=True)}


def _figures(report: page.Report) -> dict[str, Any]:
    """Return the figures as SVG and the gallery; None where there is nothing to draw."""
    names = {id(c.source): c.name for c in report.columns}
    trained = {names.get(id(s), s.name): s for s in report.sources if s.history}
    histories = {n: s.history for n, s in trained.items()}
    epochs = {n: s.config.procedure.epochs if s.config else len(s.history) for n, s in trained.items()}
    drawn: dict[str, Any] = dict.fromkeys(("accuracy", "attacks", "confusion", "gallery", "landscape"))
    drawn |= {"confusions": [], "training": figures.training_curves(histories, epochs) if histories else None}
    if report.first is None:
        return drawn
    record, gallery = report.first.record, report.first.evaluation.gallery
    records = [c.record for c in report.columns]
    drawn["accuracy"] = figures.accuracy_curves(records)
    drawn["attacks"] = [(r.model_name, figures.attack_curves(r, str(i))) for i, r in enumerate(records)]
    if record.ledger:
        counts = metrics.worst_case_confusion(record)
        drawn["confusion"] = figures.confusion(counts, [metrics.class_name(record, i) for i in range(len(counts))])
        drawn["confusions"] = page.frequent_confusions(record)
    if gallery is not None:
        drawn["gallery"] = thumbnails(gallery_folder(report.first.evaluation.path), gallery, record)
        drawn["landscape"] = gallery.landscape and figures.landscape_figure(gallery.landscape)
    return drawn


def _quoted(text: str) -> Markup:
    """Return text whose parts in backticks are code."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))


def _checks(columns: tuple[page.Column, ...]) -> list[tuple[str, list[Check | None]]]:
    """Return each check's results by column, the most severe first; None where it was not run."""
    by_column = [{check.name: check for check in c.record.verdict.checks} for c in columns]
    names = dict.fromkeys(name for checks in by_column for name in checks)
    rows = [(name, [checks.get(name) for checks in by_column]) for name in names]
    return sorted(rows, key=lambda row: min(SEVERITY[c.outcome] for c in row[1] if c is not None))


def _environments(columns: tuple[page.Column, ...]) -> list[tuple[str, list[str]]]:
    """Return versions and machine as text, with the names of the columns that were measured there."""
    environments: dict[str, list[str]] = {}
    for column in columns:
        env = column.record.environment
        packages = (f"{name} {version}" for name, version in (env.get("packages") or {}).items() if version)
        machine = f"Python {env.get('python', 'unknown')} on {env.get('device', 'unknown')} ({env.get('machine', '?')})"
        text = ", ".join([machine, *packages, f"git {env.get('git_revision') or 'unknown'}"])
        environments.setdefault(text, []).append(column.name)
    return list(environments.items())
