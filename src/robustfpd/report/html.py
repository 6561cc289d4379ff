"""`report.html`: one self-contained page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from robustfpd.evaluation import EvaluationRecord
from robustfpd.report.meanings import meanings
from robustfpd.report.metrics import NORMS, radius
from robustfpd.report.page import (
    SAID,
    Column,
    Report,
    commands,
    comparison_sentence,
    confusions,
    drawn,
    settings_that_differ,
    verdict_sentence,
)

HERE = Path(__file__).parent
VIEWS = {
    "pre-squash": "the logits before the head's squashing, which hides gradients where it saturates",
    "bpda-restoration": "as if the restored image were the image: past the decoder, straight through",
    "bpda-denoising": "past the denoising layers, straight through",
    "front-pass": "through the restoration only, not through the image that goes around it",
    "back-pass": "through the image that goes around the restoration only",
    "joint": "with a loss that spoils the restoration as well",
    "joint-hidden": "with a loss that keeps the restoration as it is",
    "straight-through": "past parts of the network that give no gradients",
}
"""What the names behind an attack mean: where it takes its gradients from."""
OUTCOMES = {"passed": "passed", "suspicious": "suspicious", "failed": "failed", "skipped": "nothing to look at"}


def render(report: Report) -> str:
    """The page as text: figures, pictures, styles and script inside, nothing to be fetched."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["quoted"] = _quoted
    environment.globals |= {
        "radius": radius, "norms": NORMS, "said": SAID, "outcomes": OUTCOMES, "commands": commands,
        "percent": lambda value: f"{100 * value:.1f} %",
        "number": lambda value: "" if value is None else f"{value:.4g}",
    }  # fmt: skip
    first = report.first
    records = [c.record for c in report.columns]
    return environment.get_template("report.html").render(
        report=report,
        first=first,
        drawn=drawn(report),
        style=(HERE / "report.css").read_text(encoding="utf-8"),
        script=(HERE / "report.js").read_text(encoding="utf-8"),
        meanings=meanings(),
        sentence=None if first is None else verdict_sentence(first.record),
        comparison=comparison_sentence(records) if records else None,
        checks=_checks(report.columns),
        radii=sorted({w.eps for r in records for w in r.worst_case}),
        robust=[{w.eps: w.robust for w in r.worst_case} for r in records],
        confusions=[] if first is None else confusions(first.record) if first.record.ledger else [],
        others=[e for s in report.sources for e in s.evaluations if all(e is not c.evaluated for c in report.columns)],
        differing=settings_that_differ(report.sources) if len(report.sources) > 1 else [],
        environments=_environments(report.columns),
        config=_yaml(report),
        passes=_passes,
        views={name: told for name, told in VIEWS.items() if any(_seen(name, c.record) for c in report.columns)},
    )


def _quoted(text: str) -> Markup:
    """Text with what stands in backticks set as code."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else p for i, p in enumerate(parts))


def _seen(view: str, record: EvaluationRecord) -> bool:
    return any(attack.attack.endswith(f", {view}") for attack in record.attacks)


def _checks(columns: tuple[Column, ...]) -> list[tuple[str, list[Any]]]:
    """Checks by name, with what each column's says; None where it was not made."""
    made = [{check.name: check for check in c.record.verdict.checks} for c in columns]
    names = dict.fromkeys(name for checks in made for name in checks)
    rows = [(name, [checks.get(name) for checks in made]) for name in names]
    grave = {"failed": 0, "suspicious": 1, "passed": 2, "skipped": 3}
    return sorted(rows, key=lambda row: min(grave[c.outcome] if c is not None else 4 for c in row[1]))


def _environments(columns: tuple[Column, ...]) -> list[tuple[str, list[str]]]:
    """Versions and machine in words, with the columns that were measured so."""
    found: dict[str, list[str]] = {}
    for column in columns:
        env = column.record.environment
        packages = (f"{name} {version}" for name, version in (env.get("packages") or {}).items() if version)
        machine = f"Python {env.get('python', 'unknown')} on {env.get('device', 'unknown')} ({env.get('machine', '?')})"
        words = ", ".join([machine, *packages, f"git {env.get('git_revision') or 'unknown'}"])
        found.setdefault(words, []).append(column.name)
    return list(found.items())


def _yaml(report: Report) -> str | None:
    config = report.sources[0].config
    return None if config is None else yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _passes(record: EvaluationRecord) -> str:
    return f"{record.forward_passes:,} images forward and {record.backward_passes:,} backward"
