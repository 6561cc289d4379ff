from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt

from robustfpd.report.page import report_on
from robustfpd.report.sources import read
from robustfpd.report.text import COLUMNS, MARK, markdown, table

if TYPE_CHECKING:
    from tests.report.conftest import MakeSource


def test_the_csv_reads_back_as_the_record(measured: Path) -> None:
    source = read(measured)
    record = source.evaluations[0].record
    rows = list(csv.DictReader(io.StringIO(table(report_on([source])))))
    assert tuple(rows[0]) == COLUMNS
    clean, *rest = rows
    assert (clean["attack"], float(clean["accuracy"])) == ("clean", record.clean.value)
    worst = {float(r["eps"]): r for r in rest if r["attack"] == "worst case"}
    assert {eps: float(r["accuracy"]) for eps, r in worst.items()} == {
        w.eps: w.robust.value for w in record.worst_case
    }  # fmt: skip
    assert all(float(r["low"]) <= float(r["accuracy"]) <= float(r["high"]) for r in worst.values())
    attacks = [r for r in rest if r["attack"] != "worst case"]
    assert [(r["attack"], int(r["turned"])) for r in attacks] == [(a.attack, a.misclassified) for a in record.attacks]
    assert {r["verdict"] for r in rows} == {record.verdict.status}


def test_the_markdown_has_verdict_numbers_attacks_and_checks(measured: Path, make_source: MakeSource) -> None:
    source = read(measured)
    record = source.evaluations[0].record
    text = markdown(report_on([source]))
    assert text.startswith(f"{MARK}\n\n# {record.model_name}\n\n**trusted**: {record.model_name} classifies ")
    html = MarkdownIt().enable("table").render(text)
    assert html.count("<tr>") == 3 + len(record.worst_case) - 1 + 2 + len(record.attacks) + len(record.verdict.checks)
    for check in record.verdict.checks:
        assert check.evidence in text
    both = markdown(report_on([make_source("a", (150, 60)), make_source("b|c", (100, 10))]))
    assert "Where they differ most" in both
    assert "## Attacks on a" in both
    assert "b\\|c" in both


def test_what_is_missing_is_told_in_markdown(make_source: MakeSource) -> None:
    bare = dataclasses.replace(make_source("a"), evaluations=(), problems=("a was not evaluated",))
    text = markdown(report_on([bare]))
    assert "There is no evaluation to report on." in text
    assert "- a was not evaluated" in text
    assert table(report_on([bare])) == ",".join(COLUMNS) + "\n"


def test_names_cannot_break_the_markdown(make_source: MakeSource) -> None:
    nasty = "a|b\n# <script>alert(1)</script> `x"
    typed = {"python": "3", "packages": {}, "command": "robustfpd evaluate 'x```\n# y'"}
    source = make_source("n", (150, 60))
    record = source.evaluations[0].record.model_copy(update={"model_name": nasty, "environment": typed})
    changed = dataclasses.replace(source, evaluations=(dataclasses.replace(source.evaluations[0], record=record),))
    html = MarkdownIt("js-default", {"html": True}).enable("table").render(markdown(report_on([changed])))
    assert "<script>" not in html
    assert html.count("<h1>") == 1
    assert html.count("<pre>") == 1
