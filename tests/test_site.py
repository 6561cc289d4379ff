"""The documentation as it is built: `make docs` builds it and runs these; elsewhere it is built for them first."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.documents import DOCS, PAGES, ROOT, name_of

from robustfpd.cli import COMMANDS
from robustfpd.config import AdversarialConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig

pytestmark = pytest.mark.slow

CHROMIUM = Path("/usr/bin/chromium")
PAGE_NAMES = [*(name_of(page).removesuffix(".md") for page in PAGES), "look-inside"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages: those in `site/` where nothing is newer, else built anew."""
    ready = ROOT / "site" / "index.html"
    sources = [ROOT / "mkdocs.yml", *DOCS.rglob("*"), *(ROOT / "src").rglob("*.py")]
    if ready.is_file() and ready.stat().st_mtime > max(path.stat().st_mtime for path in sources if path.is_file()):
        return ready.parent
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    sync = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.is_file():
        pytest.skip("no Chromium")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


def test_all_pages_are_built(site: Path) -> None:
    for name in PAGE_NAMES:
        assert (site / f"{name}.html").stat().st_size > 5000, name
    assert not list(site.rglob("*.py"))


def test_pages_take_nothing_from_elsewhere(site: Path) -> None:
    taken = re.compile(r"<(?:script|img|iframe|link|source)[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not taken.search(text), page
        assert not re.search(r"cdnjs|googleapis|unpkg|jsdelivr", text), page


def test_links_between_pages_lead_somewhere(site: Path) -> None:
    text = {page: page.read_text() for page in site.rglob("*.html") if page.name != "404.html"}
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', shown)) for page, shown in text.items()}
    for page, shown in text.items():
        for target in re.findall(r'<a [^>]*href="([^"]+)"', shown):
            if re.match(r"https?:", target):
                continue
            path, _, anchor = target.partition("#")
            found = (page.parent / path).resolve() if path not in ("", ".") else page
            assert found.exists(), (page.name, target)
            assert not anchor or anchor in anchors[found] or anchor == "__top", (page.name, target)


def test_the_references_list_each_command_and_each_setting(site: Path) -> None:
    commands, settings = (
        (site / "reference" / "cli.html").read_text(),
        (site / "reference" / "settings.html").read_text(),
    )
    for name in COMMANDS:
        assert f'id="{name}"' in commands, name
    for cls in (RunConfig, DataConfig, ModelConfig, TrainingConfig, AdversarialConfig):
        for field in cls.model_fields:
            assert re.search(rf'id="robustfpd\.config\.[\w.]*{cls.__name__}\.{field}"', settings), (cls, field)


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
@pytest.mark.parametrize("name", PAGE_NAMES)
def test_a_page_opens_without_requests_errors_or_overflow(
    site: Path, browser: Any, name: str, width: int, scheme: str
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    requested: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto((site / f"{name}.html").as_uri())
    page.wait_for_timeout(50)
    assert [url for url in requested if not url.startswith(("file:", "data:", "blob:"))] == []
    assert errors == []
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert page.evaluate("[...document.images].filter(image => !image.naturalWidth).length") == 0
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index", "tutorial", "method", "look-inside", "reference/cli", "reference/settings"])
def test_a_page_is_accessible(site: Path, browser: Any, name: str, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page = browser.new_page(color_scheme=scheme)
    page.goto((site / f"{name}.html").as_uri())
    found = axe.Axe().run(page).response["violations"]
    page.close()
    assert [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")] == []


def test_the_notebook_ran_when_the_site_was_built(site: Path) -> None:
    """Building executes it and fails where a cell does; here its outputs are looked for."""
    notebook = json.loads((DOCS / "look-inside.ipynb").read_text())
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "outputs are made when the pages are built; clear them"
    page = (site / "look-inside.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert "Traceback" not in page
