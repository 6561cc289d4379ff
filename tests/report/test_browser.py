"""The report in a real browser; skipped where none is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from robustfpd.report.page import report_on
from robustfpd.report.sources import read
from robustfpd.report.write import write_report

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        if os.environ.get("CI"):
            pytest.fail("CI must have a browser: apt-get install chromium")
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as play:
        launched = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(measured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a real evaluation, with another beside it."""
    page = tmp_path_factory.mktemp("report") / "report.html"
    write_report(page, report_on([read(measured), read("digits/mini-fpd")]))
    return page


@pytest.fixture(params=[(size, scheme) for size in SIZES for scheme in ("light", "dark")], ids=lambda p: "-".join(p))
def opened(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page in a browser window, what the console said, and what was asked of the network."""
    size, scheme = request.param
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda r: asked.append(r.url) if not r.url.startswith("data:") else None)
    page.goto(report.as_uri())
    yield page, said, asked
    context.close()


def test_the_page_opens_without_errors_and_asks_nothing_of_the_network(
    opened: tuple[Any, list[str], list[str]], report: Path
) -> None:
    page, said, asked = opened
    page.wait_for_load_state("networkidle")
    assert said == []
    assert asked == [report.as_uri()]


def test_every_figure_is_visible_and_nothing_is_wider_than_the_window(
    opened: tuple[Any, list[str], list[str]],
) -> None:
    page, *_ = opened
    figures = page.locator("figure svg, figure img").all()
    assert len(figures) > 20
    for figure in figures:
        box = figure.bounding_box()
        assert box is not None
        assert box["width"] >= 40
        assert box["height"] >= 40
        assert box["x"] + box["width"] <= page.viewport_size["width"]
    broken = "images => images.filter(image => !(image.complete && image.naturalWidth)).length"
    assert page.eval_on_selector_all("img", broken) == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_tables_sort_by_keyboard_and_both_ways(opened: tuple[Any, list[str], list[str]]) -> None:
    page, *_ = opened
    heading = page.locator("#attacks ~ div table.sortable th", has_text="passes").first
    column = heading.evaluate("cell => cell.cellIndex")
    rows = heading.locator("xpath=ancestor::table/tbody/tr")

    def values() -> list[float]:
        told: list[float] = rows.evaluate_all(f"rows => rows.map(row => Number(row.cells[{column}].dataset.value))")
        return told

    before = values()
    assert len(set(before)) > 2
    heading.locator("button").focus()
    for order, backwards in (("ascending", False), ("descending", True)):
        page.keyboard.press("Enter")
        assert values() == sorted(before, reverse=backwards)
        assert heading.get_attribute("aria-sort") == order
    named = page.locator("#attacks ~ div table.sortable th", has_text="attack").first
    named.locator("button").click()
    names = rows.evaluate_all("rows => rows.map(row => row.cells[0].textContent)")
    assert names == sorted(names, key=str.lower)
    assert heading.get_attribute("aria-sort") is None


def test_what_a_check_means_opens_at_its_link(opened: tuple[Any, list[str], list[str]]) -> None:
    page, *_ = opened
    meaning = page.locator("#check-squashed-outputs")
    assert not meaning.is_visible()
    page.locator('a[href="#check-squashed-outputs"]').focus()
    page.keyboard.press("Enter")
    meaning.wait_for(state="visible")


def test_the_keyboard_reaches_everything(opened: tuple[Any, list[str], list[str]]) -> None:
    page, *_ = opened
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    reached: set[str] = set()
    for _ in range(150):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName"))
    assert {"A", "BUTTON", "SUMMARY", "DIV"} <= reached


def test_axe_finds_nothing_serious(opened: tuple[Any, list[str], list[str]]) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page, *_ = opened
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    found = axe.Axe().run(page).response["violations"]
    serious = [
        (violation["id"], violation["nodes"][0]["html"][:200])
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]
    assert serious == []


def test_on_paper_everything_is_open(browser: Any, report: Path) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("#check-squashed-outputs").is_visible()
    assert not page.locator("nav").is_visible()
    assert page.pdf().startswith(b"%PDF")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not page.locator("#check-squashed-outputs").is_visible()
    page.close()
