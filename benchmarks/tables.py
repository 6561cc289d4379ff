"""Tables on pages of docs/, between two markers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def replace_between(page: Path, begin: str, end: str, lines: Iterable[str]) -> None:
    """Replace what is between two markers of a page.

    Raises:
        ValueError: the page lacks a marker.
    """
    before, first, rest = page.read_text().partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"{page} lacks the marker {begin if not first else end}")
    page.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n\n{end}{after}")
