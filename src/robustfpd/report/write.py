"""A report on disk: a page, Markdown and CSV side by side."""

from __future__ import annotations

from pathlib import Path

from robustfpd.errors import InputError
from robustfpd.evaluation.ledger import writing
from robustfpd.io import write_text
from robustfpd.report.html import render
from robustfpd.report.page import Report
from robustfpd.report.text import COLUMNS, MARK, markdown, table


def write_report(page: Path, report: Report) -> list[Path]:
    """Write `page`, and .md and .csv beside it; each is replaced as a whole.

    Returns:
        The three paths, the page first.

    Raises:
        InputError: the page is not called .html, cannot be written, or would replace a .md or .csv of someone else's.
    """
    if page.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"a report's page must be an .html file, found {page}; the .md and .csv go beside it")
    for path, beginning in ((page.with_suffix(".md"), MARK), (page.with_suffix(".csv"), ",".join(COLUMNS))):
        if path.is_file() and not path.read_text(encoding="utf-8", errors="replace").startswith(beginning):
            raise InputError(f"{path} is there and is no report's; give the page another name with --out")
    written = {page: render(report), page.with_suffix(".md"): markdown(report), page.with_suffix(".csv"): table(report)}
    for path, text in written.items():
        with writing(path):
            write_text(path, text)
    return list(written)
