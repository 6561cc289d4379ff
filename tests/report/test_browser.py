"""The report in a real browser; skipped where none is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
VIEWPORTS = {"desktop-light": (1280, 900), "phone-dark": (390, 844)}
both_viewports = pytest.mark.parametrize("viewport", VIEWPORTS)


@pytest.fixture(scope="module")
def pages(report_page: Path) -> Iterator[dict[str, Any]]:
    """The opened page by viewport; console messages and requests are in its attributes `messages` and `requests`."""
    sync_api = pytest.importorskip("playwright.sync_api")
    if not BROWSER:
        if os.environ.get("CI"):
            pytest.fail("CI must have a browser: apt-get install chromium")
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        opened = {}
        for name, (width, height) in VIEWPORTS.items():
            scheme = name.partition("-")[2]
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.messages, page.requests = [], []
            page.on("console", lambda m, page=page: page.messages.append(f"{m.type}: {m.text}"))
            page.on("pageerror", lambda error, page=page: page.messages.append(str(error)))
            page.on("request", lambda r, page=page: page.requests.append(r.url))
            page.goto(report_page.as_uri())
            opened[name] = page
        yield opened
        browser.close()


@pytest.fixture
def desktop(pages: dict[str, Any]) -> Any:
    """The page at a desktop's size, loaded again."""
    page = pages["desktop-light"]
    page.goto("about:blank")  # a link that was followed stays in the address
    page.goto(page.requests[0])
    return page


@both_viewports
def test_the_page_opens_without_errors_and_loads_nothing(
    pages: dict[str, Any], viewport: str, report_page: Path
) -> None:
    page = pages[viewport]
    page.wait_for_load_state("networkidle")
    assert page.messages == []
    assert {url for url in page.requests if not url.startswith(("data:", "about:"))} == {report_page.as_uri()}


@both_viewports
def test_every_figure_is_visible_and_nothing_is_wider_than_the_window(pages: dict[str, Any], viewport: str) -> None:
    page = pages[viewport]
    boxes = page.eval_on_selector_all(
        "figure svg, figure img",
        "figures => figures.map(f => f.getBoundingClientRect()).map(b => [b.width, b.height, b.right])",
    )
    assert len(boxes) > 20
    for width, height, right in boxes:
        assert min(width, height) >= 40
        assert right <= page.viewport_size["width"]
    broken = "images => images.filter(image => !(image.complete && image.naturalWidth)).length"
    assert page.eval_on_selector_all("img", broken) == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_tables_sort_by_keyboard_and_both_ways(desktop: Any) -> None:
    heading = desktop.locator("#attacks ~ div table.sortable th", has_text="passes").first
    column = heading.evaluate("cell => cell.cellIndex")
    rows = heading.locator("xpath=ancestor::table/tbody/tr")

    def values() -> list[float]:
        cells: list[float] = rows.evaluate_all(f"rows => rows.map(row => Number(row.cells[{column}].dataset.value))")
        return cells

    before = values()
    assert len(set(before)) > 2
    heading.locator("button").focus()
    for order, backwards in (("ascending", False), ("descending", True)):
        desktop.keyboard.press("Enter")
        assert values() == sorted(before, reverse=backwards)
        assert heading.get_attribute("aria-sort") == order
    desktop.locator("#attacks ~ div table.sortable th", has_text="attack").first.locator("button").click()
    names = rows.evaluate_all("rows => rows.map(row => row.cells[0].textContent)")
    assert names == sorted(names, key=str.lower)
    assert heading.get_attribute("aria-sort") is None


def test_the_meaning_of_a_check_opens_at_its_link(desktop: Any) -> None:
    meaning = desktop.locator("#check-squashed-outputs")
    assert not meaning.is_visible()
    desktop.locator('a[href="#check-squashed-outputs"]').focus()
    desktop.keyboard.press("Enter")
    meaning.wait_for(state="visible")


def test_the_keyboard_reaches_everything(desktop: Any) -> None:
    desktop.keyboard.press("Tab")
    assert desktop.evaluate("document.activeElement.textContent") == "Skip to the report"
    reached: set[str] = set()
    for _ in range(150):
        desktop.keyboard.press("Tab")
        reached.add(desktop.evaluate("document.activeElement.tagName"))
    assert {"A", "BUTTON", "SUMMARY", "DIV"} <= reached


@both_viewports
def test_axe_finds_nothing_serious(pages: dict[str, Any], viewport: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = pages[viewport]
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    violations = axe.Axe().run(page).response["violations"]
    serious = [(v["id"], v["nodes"][0]["html"][:200]) for v in violations if v["impact"] in ("serious", "critical")]
    assert serious == []


def test_everything_is_open_in_print(desktop: Any) -> None:
    desktop.emulate_media(media="print")
    desktop.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert desktop.locator("#check-squashed-outputs").is_visible()
    assert not desktop.locator("nav").is_visible()
    assert desktop.pdf().startswith(b"%PDF")
    desktop.evaluate("dispatchEvent(new Event('afterprint'))")
    assert not desktop.locator("#check-squashed-outputs").is_visible()
    desktop.emulate_media(media="screen")
