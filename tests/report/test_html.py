from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import robustfpd as rf
from robustfpd.data import ImageSet
from robustfpd.evaluation import Proportion
from robustfpd.models.mode import evaluating
from robustfpd.report.gallery import defence_gallery
from robustfpd.report.html import Gallery, Subject, summary, write_report
from robustfpd.report.tables import comparison_table, evaluation_table

if TYPE_CHECKING:
    from tests.report.conftest import MakeRecord

MakeSubject = Callable[..., Subject]
VOID = {"meta", "link", "img", "br", "hr", "input"}


class _Page(HTMLParser):
    """Tags that are not closed in order, what the page would load, its table and its headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action") or "url(" in (value or ""):
                self.loads.append(value or "")
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
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


@pytest.fixture
def page(tmp_path: Path, make_subject: MakeSubject, gallery: Gallery) -> str:
    subjects = [
        make_subject("FPD", (150, 60)),
        make_subject("plain twin", (100, 10)),
        make_subject("third net", (90, 5)),
    ]
    path = write_report(tmp_path / "sub" / "report.html", "What it buys", subjects, gallery, ["robustfpd train a --b"])
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_the_page_loads_nothing(page: str) -> None:
    parsed = _Page(page)
    assert parsed.open == []
    assert parsed.loads
    for load in parsed.loads:
        assert re.match(r"#|url\(#|data:image/png;base64,", load) or re.search(r"url\(#", load), load[:80]
        assert "//" not in load.split("base64,")[0]
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert "iframe" not in parsed.tags
    assert not re.search(r"@import|url\(\s*['\"]?(https?:)?//", page)
    assert "import(" not in page


def test_every_network_is_named_with_its_numbers(page: str) -> None:
    expected = ["eps", "FPD", "plain twin", "third net"]
    expected += ["0 (clean)", *[str(Proportion.of(190, 200))] * 3]
    for eps, counts in (("0.1", (150, 100, 90)), ("0.2", (60, 10, 5))):
        expected += [eps, *(str(Proportion.of(count, 200)) for count in counts)]
    assert _Page(page).cells == expected
    assert "75.0 % [68.6, 80.5]" in page
    for name in ("FPD", "plain twin", "third net"):
        assert page.count(f"<!-- {name} -->") >= 2  # matplotlib notes every drawn text; the curves and the training


def test_the_page_says_how_to_repeat_it(page: str) -> None:
    text = unescape(page)
    for part in (
        "Seed 7",
        "sha256 0123456789abcdef…",
        "Python 3.11.9",
        "torch 2.11.0",
        "git none",
        "recipe: recipe of FPD",
    ):
        assert part in text
    assert "share of 200 test images" in text
    assert "linf radius" in text
    assert "robustfpd train a --b" in text
    assert page.count("<h1>") == 1
    assert "<title>What it buys</title>" in page


def test_names_and_captions_are_escaped(tmp_path: Path, make_subject: MakeSubject, gallery: Gallery) -> None:
    nasty = "<script>alert('x')</script> & \"q\" --> $\\frac$"
    shown = Gallery(gallery.titles, gallery.rows, nasty)
    subjects = [make_subject(nasty), make_subject("b")]
    text = write_report(tmp_path / "r.html", nasty, subjects, shown, [nasty]).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert _Page(text).open == []
    assert "script" not in _Page(text).tags


def test_one_network_and_many_have_a_page_too(tmp_path: Path, make_subject: MakeSubject, gallery: Gallery) -> None:
    write_report(tmp_path / "one.html", "t", [make_subject("only")], gallery, [])
    names = [f"network {i}" for i in range(7)]
    path = write_report(tmp_path / "many.html", "t", [make_subject(n) for n in names], gallery, [])
    text = path.read_text(encoding="utf-8")
    assert all(text.count(f"<!-- {name} -->") == 2 for name in names)


def test_a_report_replaces_what_was_there(tmp_path: Path, make_subject: MakeSubject, gallery: Gallery) -> None:
    path = tmp_path / "r.html"
    path.write_text("old")
    write_report(path, "t", [make_subject("only")], gallery, [])
    first = path.read_text(encoding="utf-8")
    write_report(path, "t", [make_subject("only")], gallery, [])
    assert path.read_text(encoding="utf-8") == first
    assert first.startswith("<!doctype html>")


def test_summary_of_clear_differences(make_record: MakeRecord) -> None:
    ours, worse, worst = make_record("A", (150, 60)), make_record("B", (140, 10)), make_record("C", (20, 5))
    said = summary([ours, worst, worse])
    assert said == (
        f"Where they differ most, at eps 0.2, A keeps {Proportion.of(60, 200)} and the best rival, B, "
        f"{Proportion.of(10, 200)}: more robust by 25 points."
    )
    assert summary([worse, ours]).endswith(f"B keeps {Proportion.of(10, 200)} and the best rival, A, "
                                           f"{Proportion.of(60, 200)}: less robust by 25 points.")  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs", "clear"), [(100, 99, False), (100, 100, False), (110, 91, False), (115, 86, True)]
)
def test_summary_speaks_of_a_difference_only_where_intervals_part(
    make_record: MakeRecord, ours: int, theirs: int, clear: bool
) -> None:
    a, b = Proportion.of(ours, 200), Proportion.of(theirs, 200)
    assert clear == (b.high < a.low)
    for first, second in ((ours, theirs), (theirs, ours)):
        said = summary([make_record("A", (first,)), make_record("B", (second,))])
        assert ("no clear difference: the intervals overlap" in said) is not clear
        assert ("points" in said) is clear


def test_summary_of_one_network(make_record: MakeRecord) -> None:
    said = summary([make_record("A", (150, 60))])
    assert said == f"A: {Proportion.of(190, 200)} clean, {Proportion.of(60, 200)} at eps 0.2."


def test_tables_hold_the_numbers(make_record: MakeRecord) -> None:
    records = [make_record("A", (150, 60)), make_record("B", (100, 10))]
    columns = [list(c.cells) for c in comparison_table(records).columns]
    assert columns[0] == ["0 (clean)", "0.1", "0.2"]
    assert columns[1] == ["95.0 [91, 97]", "75.0 [69, 80]", "30.0 [24, 37]"]
    assert str(columns[2][2]).startswith("5.0 [")
    columns = [list(c.cells) for c in evaluation_table(records[0]).columns]
    assert columns[1] == [str(Proportion.of(k, 200)) for k in (190, 150, 60)]
    assert columns[2] == ["clean", "FGSM 40/190\nPGD-40 39/190", "FGSM 130/190\nPGD-40 129/190"]


def test_the_gallery_shows_what_the_model_says() -> None:
    model = rf.enhance("resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8).train()
    model.backbone.eval()
    flags = [m.training for m in model.modules()]
    draws = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (9, 1, 8, 8), generator=draws, dtype=torch.uint8)
    images = ImageSet(pictures, torch.arange(9) % 3)
    found = defence_gallery(model, images, noise=0.1, eps=0.2, seed=3, count=4)
    again = defence_gallery(model, images, noise=0.1, eps=0.2, seed=3, count=4)
    assert [m.training for m in model.modules()] == flags
    assert len(found.rows) == 4
    assert "4 test images" in found.caption
    for row, same in zip(found.rows, again.rows, strict=True):
        clean, noisy, adversarial, restored = row.images
        assert all(torch.equal(a, b) for a, b in zip(row.images, same.images, strict=True))
        assert any(torch.equal(clean, picture / 255) for picture in pictures)
        assert 0 < float((noisy - clean).abs().max()) <= 0.1 + 1e-6
        assert 0 < float((adversarial - clean).abs().max()) <= 0.2 + 1e-6
        with evaluating(model), torch.no_grad():
            out = model(adversarial[None])
        torch.testing.assert_close(restored, out.restored[0], atol=1e-4, rtol=1e-4)
        assert row.captions[2].startswith(f"{int(out.logits.argmax())}, ")
    assert "3 test images" in defence_gallery(model, images.take(torch.arange(3)), noise=0.1, eps=0.2, seed=3).caption
