"""Reads the documentation's pages: their blocks of code, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"(<!-- run -->\n)?^```(\w+)([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


LANGUAGES = ("sh", "python", "text")
"""What blocks may be; tests run the first two."""


@dataclass(frozen=True)
class Block:
    """One block of code."""

    language: str
    title: str | None
    """The file that it is."""
    body: str
    runs: bool
    """A shell block whose commands work offline, in seconds, where the page's other blocks were run."""

    def commands(self) -> list[list[str]]:
        """Words of the block's lines, without variables before and redirections behind."""
        lines = self.body.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := _words(line))]


def _words(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    ends = [place for place, word in enumerate(words) if word in ("&", ">", "|", "<")]
    return words[: ends[0]] if ends else words


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order; refuses a page with fences that no test would look behind."""
    found = []
    text = page.read_text()
    missed = [line for line in FENCE.sub("", text).splitlines() if line.lstrip().startswith(("```", "~~~"))]
    assert not missed, f"{page} has fences that are no blocks: {missed}; begin them in column 0, with a language"
    for run, language, info, body in FENCE.findall(text):
        assert language in LANGUAGES, f"{page} has a block of {language}; known are {', '.join(LANGUAGES)}"
        inside = [line for line in body.splitlines() if line.lstrip().startswith("```")]
        assert not inside, f"{page} has fences inside a block: {inside}; end it in column 0"
        title = re.search(r'title="([^"]+)"', info)
        found.append(Block(language, title and title.group(1), body, bool(run)))
    return found


def inline_commands(page: Path) -> list[list[str]]:
    """Commands in the text itself; `robustfpd COMMAND` and the like only tell a form."""
    text = FENCE.sub("", page.read_text())
    found = [shlex.split(command) for command in re.findall(r"`(robustfpd [^`]+)`", text)]
    return [words for words in found if not words[1].isupper()]


def name_of(page: Path) -> str:
    """What tests call a page."""
    return str(page.relative_to(DOCS))
