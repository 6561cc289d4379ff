from __future__ import annotations

import csv
import dataclasses
import io
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.errors import InputError
from robustfpd.evaluation import Check, EvaluationRecord, Proportion, Verdict
from robustfpd.evaluation.checks import NAMES
from robustfpd.evaluation.gallery import GalleryIndex
from robustfpd.report import thumbnails
from robustfpd.report.html import check_meanings, render, write_report
from robustfpd.report.metrics import COLUMNS, answers_text, comparison_table, csv_text, evaluation_table
from robustfpd.report.page import report_on
from robustfpd.report.sources import read

if TYPE_CHECKING:
    from tests.report.conftest import MakeRecord, MakeSource

VOID = {"meta", "link", "img", "br", "hr", "input"}


class _Page(HTMLParser):
    """Tags that are not closed in order, what the page would load, its cells and its ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.alts: list[str | None] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if tag == "a" and name == "href":
                self.links.append(value or "")
            elif name in ("src", "href", "xlink:href", "srcset", "data", "action") or "url(" in (value or ""):
                self.loads.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag == "img":
            self.alts.append(dict(attrs).get("alt"))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and any(tag in ("td", "th") for tag in self.open[-3:]):
            self.cells[-1] += data


@pytest.fixture(scope="module")
def page(report_page: Path) -> str:
    return report_page.read_text(encoding="utf-8")


@pytest.fixture
def compared(make_source: MakeSource) -> str:
    sources = [
        make_source(n, r) for n, r in (("FPD", (150, 60)), ("undefended baseline", (100, 10)), ("third net", (90, 5)))
    ]
    return render(report_on(sources, title="FPD and baselines"))


def test_the_page_loads_nothing_and_is_well_formed(page: str) -> None:
    parsed = _Page(page)
    assert parsed.open == []
    assert parsed.loads
    for load in parsed.loads:
        assert re.match(r"#|url\(#|data:(image/(png|webp);base64)?,?", load) or re.search(r"url\(#", load), load[:80]
        assert "//" not in load.split("base64,")[0]
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//|fetch\(|import\(|<iframe|<link rel=\"style", page)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)
    assert all(link.startswith("#") for link in parsed.links)


def test_every_part_of_a_real_evaluation_is_there(page: str) -> None:
    text = unescape(page)
    for part in (
        "a small network classifies", "Is the model robust?", "Is the measurement reliable?", "trusted", "guessing",
        "clean accuracy", "worst-case robust accuracy, L∞ eps 0.1",
        "Misclassified under attack", "Robust: the attack", "Loss landscape", "Confusion matrix",
        "Seed 0, batches of 64",
        "The most frequent mistakes", "There are no training curves",
    ):  # fmt: skip
        assert part in text, part
    assert re.search(r"digit \d → digit \d · ", text)
    parsed = _Page(page)
    assert len(parsed.alts) > 20 * 3
    assert all(parsed.alts)
    assert 'class="gone"' not in page


def test_every_check_has_its_evidence_and_what_it_means(page: str, measured: Path) -> None:
    checks = read(measured).evaluations[0].record.verdict.checks
    text = unescape(page)
    assert {c.name for c in checks} == set(NAMES)
    for check in checks:
        assert check.evidence in text
        assert f'href="#check-{check.name}"' in page
        assert f'id="check-{check.name}"' in page
    assert set(check_meanings()) >= set(NAMES)
    assert "<strong>Question:</strong>" in page


def test_the_fix_of_a_suspicious_check_is_shown(make_source: MakeSource) -> None:
    check = Check(name="single-step", outcome="suspicious", evidence="12 under FGSM only", fix="find <what> misleads")
    page = render(report_on([make_source("FPD", verdict=Verdict.of([check]))]))
    assert "12 under FGSM only</span><br>→ find &lt;what&gt; misleads" in page


def test_every_network_is_named_with_its_numbers(compared: str) -> None:
    cells = [" ".join(cell.split()) for cell in _Page(compared).cells]
    expected = ["eps (L∞)", "FPD", "undefended baseline", "third net"]
    expected += ["0 (clean)", *[str(Proportion.of(190, 200))] * 3]
    for eps, counts in (("0.1", (150, 100, 90)), ("0.2", (60, 10, 5))):
        expected += [eps, *(str(Proportion.of(count, 200)) for count in counts)]
    start = cells.index(expected[0])
    assert cells[start : start + len(expected)] == expected
    beside = ["FPD", "partly robust", "trusted", str(Proportion.of(190, 200)), str(Proportion.of(60, 200)), "0.2"]
    assert cells[6:12] == beside
    assert "75.0 % [68.6, 80.5]" in compared
    assert "Where they differ most, at eps 0.1, FPD reaches" in compared
    assert compared.count("<title>FPD and baselines: robustness report</title>") == 1
    assert "recipe of third net" in compared


@pytest.mark.parametrize(
    ("robust", "level", "style"),
    [
        ((0, 0), "not robust", "bold red"), ((150, 60), "partly robust", "bold"),
        ((190, 180), "robust", "bold green"),
    ],
)  # fmt: skip
def test_only_a_robust_model_is_green(
    make_source: MakeSource, robust: tuple[int, ...], level: str, style: str
) -> None:  # fmt: skip
    report = report_on([make_source("net", robust)])
    text = answers_text(report.columns[0].record)
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert (styles[level], styles["trusted"]) == (style, "bold")
    page = render(report)
    body = page[page.index("<body>") :]
    assert set(re.findall(r'class="[^"]*level-([a-z-]+)', body)) == {level.replace(" ", "-")}
    green = re.search(r"^(.*) \{ color: var\(--good\); \}", page, flags=re.MULTILINE)
    assert green is not None
    assert green.group(1) == ".level-robust"


def test_the_headline_of_an_unreliable_measurement_says_so(make_source: MakeSource) -> None:
    check = Check(name="single-step", outcome="suspicious", evidence="12 under FGSM only")
    page = render(report_on([make_source("net", (190, 180), verdict=Verdict.of([check]))]))
    headline = "Robust accuracy at most 90.0 % at L∞ 0.2: the measurement is not reliable (single-step: 12 under"
    assert f'<p class="headline">{headline}' in page
    assert "level-robust" not in page[page.index("<body>") :]


def test_names_are_escaped(make_source: MakeSource) -> None:
    nasty = "<script>alert('x')</script> & \"q\" --> $\\frac$"
    text = render(report_on([make_source(nasty.replace("/", "|")), make_source("b")], title=nasty))
    assert text.count("<script") == 1  # the page's own
    assert "&lt;script&gt;" in text
    assert _Page(text).open == []


def test_photographs_are_reduced_until_they_fit(
    photographs: tuple[Path, GalleryIndex], make_source: MakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thumbnails, "MAX_BYTES", thumbnails.MAX_BYTES // 5)  # for 60 photographs, the whole limit
    folder, gallery = photographs
    source = make_source("photographs")
    evaluation = dataclasses.replace(source.evaluations[0], path=folder.with_name("record.json"), gallery=gallery)
    text = render(report_on([dataclasses.replace(source, evaluations=(evaluation,))]))
    assert sum(map(len, re.findall(r'"data:image/webp[^"]*"', text))) < thumbnails.MAX_BYTES + 1000
    assert len(text.encode()) < thumbnails.MAX_BYTES + 1_000_000
    assert text.count("data:image/webp;base64,") == 12 * 3
    assert 'class="gone"' not in text


def test_a_report_is_a_page_and_a_csv_and_replaces_its_own_files(make_source: MakeSource, tmp_path: Path) -> None:
    report, page = report_on([make_source("only")]), tmp_path / "sub" / "r.html"
    files = write_report(page, report)
    assert [f.name for f in files] == ["r.html", "r.csv"]
    assert sorted(p.name for p in page.parent.iterdir()) == ["r.csv", "r.html"]
    first = page.read_text(encoding="utf-8")
    assert first.startswith("<!doctype html>")
    page.write_text("old")
    write_report(page, report)
    assert page.read_text(encoding="utf-8") == first
    (tmp_path / "data.csv").write_text("mine")
    with pytest.raises(InputError, match=r"data\.csv exists and is not the CSV of a report"):
        write_report(tmp_path / "data.html", report)
    assert (tmp_path / "data.csv").read_text() == "mine"
    with pytest.raises(InputError, match=r"must be an \.html file"):
        write_report(tmp_path / "r.pdf", report)


def test_tables_hold_the_numbers(make_record: MakeRecord) -> None:
    records = [make_record("A", (150, 60)), make_record("B", (100, 10))]
    columns = [list(c.cells) for c in comparison_table(records).columns]
    assert columns[0] == ["0 (clean)", "0.1", "0.2", "robust?", "reliable?"]
    assert list(map(str, columns[1])) == ["95.0 [91, 97]", "75.0 [69, 80]", "30.0 [24, 37]", "partly robust", "trusted"]
    assert str(columns[2][2]).startswith("5.0 [")
    columns = [list(c.cells) for c in evaluation_table(records[0]).columns]
    assert columns[1] == [str(Proportion.of(k, 200)) for k in (190, 150, 60)]
    assert columns[2] == ["clean", "FGSM 40/190\nPGD-40 39/190", "FGSM 130/190\nPGD-40 129/190"]


def test_a_radius_of_0_is_one_row_of_each_table(digits: tuple[nn.Module, Tensor, Tensor], tmp_path: Path) -> None:
    net, images, labels = digits
    with_zero, only_zero = (
        rf.evaluate(net, (images[:20], labels[:20]), suite="first-look", eps=eps, model_name=f"net {eps}")
        for eps in ([0.0, 0.05, 0.1], 0.0)
    )
    columns = [list(c.cells) for c in evaluation_table(with_zero).columns]
    assert columns[0] == ["0", "0.05", "0.1"]
    assert columns[1][0] == str(with_zero.clean)
    assert list(evaluation_table(only_zero).columns[0].cells) == ["0"]
    columns = [list(c.cells) for c in comparison_table([with_zero, with_zero]).columns]
    assert columns[0] == ["0 (clean)", "0.05", "0.1", "robust?", "reliable?"]
    rows = list(csv.DictReader(io.StringIO(csv_text([with_zero, only_zero]))))
    assert [r["attack"] for r in rows if float(r["eps"]) == 0] == ["clean", "clean"]
    for name, record in (("with", with_zero), ("only", only_zero)):
        record.save(tmp_path / name / "record.json")
        page = tmp_path / f"{name}.html"
        write_report(page, report_on([read(tmp_path / name)]))
        shown = re.findall('<th scope="row">(0.*?)</th>', page.read_text())
        assert shown == ["0 (clean)", *(f"{w.eps:g}" for w in record.under_attack)]


def test_the_csv_reads_back_as_the_record(measured_record: EvaluationRecord) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text([measured_record]))))
    assert tuple(rows[0]) == COLUMNS
    clean, *rest = rows
    assert (clean["attack"], float(clean["accuracy"])) == ("clean", measured_record.clean.value)
    worst = {float(r["eps"]): r for r in rest if r["attack"] == "worst case"}
    assert {eps: float(r["accuracy"]) for eps, r in worst.items()} == {
        w.eps: w.robust.value for w in measured_record.worst_case
    }  # fmt: skip
    assert all(float(r["low"]) <= float(r["accuracy"]) <= float(r["high"]) for r in worst.values())
    attacks = [(r["attack"], int(r["misclassified"])) for r in rest if r["attack"] != "worst case"]
    assert attacks == [(a.attack, a.misclassified) for a in measured_record.attacks]
    assert {r["verdict"] for r in rows} == {measured_record.verdict.status}
    assert csv_text([]) == ",".join(COLUMNS) + "\n"
