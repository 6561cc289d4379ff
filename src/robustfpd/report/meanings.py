"""What each check asks, measures and means: the entries of docs/checks.md, to be read beside the evidence."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

INSTALLED = Path(__file__).with_name("checks.md")
CHECKOUT = Path(__file__).parents[3] / "docs" / "checks.md"


@cache
def meanings() -> dict[str, str]:
    """HTML by the name of the check; empty where the page is not there."""
    path = next((p for p in (INSTALLED, CHECKOUT) if p.is_file()), None)
    if path is None:
        return {}
    render = MarkdownIt("js-default", {"html": False})
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", path.read_text(encoding="utf-8"))  # links lead to other pages
    parts = re.split(r"^### `([a-z-]+)`\n", text, flags=re.MULTILINE)
    texts = (re.split(r"^## ", part, flags=re.MULTILINE)[0] for part in parts[2::2])
    return {name: render.render(text) for name, text in zip(parts[1::2], texts, strict=True)}
