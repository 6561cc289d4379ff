"""Parse the documentation's pages: their code blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *PAGES]
FENCE = re.compile(r"(<!-- run -->\n)?^```(\w+)([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


LANGUAGES = ("sh", "python", "text")
"""Languages of code blocks; tests run the first two."""


@dataclass(frozen=True)
class Block:
    """One block of code."""

    language: str
    title: str | None
    """Name of the file that the block shows."""
    body: str
    runs: bool
    """Whether the test runs a shell block: its commands work offline, in seconds, after the page's other blocks."""

    def commands(self) -> list[list[str]]:
        """Return the words of each line, without leading variables and trailing redirections."""
        lines = self.body.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := _words(line))]


def _words(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    ends = [place for place, word in enumerate(words) if word in ("&", ">", "|", "<")]
    return words[: ends[0]] if ends else words


def blocks(page: Path) -> list[Block]:
    """Return all blocks of a page, in order; a fence that the tests would miss is an AssertionError."""
    found = []
    text = page.read_text()
    missed = [line for line in FENCE.sub("", text).splitlines() if line.lstrip().startswith(("```", "~~~"))]
    assert not missed, f"{page} has fences that are no blocks: {missed}; start them in column 0, with a language"
    for run, language, info, body in FENCE.findall(text):
        assert language in LANGUAGES, f"{page} has a block of {language}; known are {', '.join(LANGUAGES)}"
        inside = [line for line in body.splitlines() if line.lstrip().startswith("```")]
        assert not inside, f"{page} has fences inside a block: {inside}; end it in column 0"
        title = re.search(r'title="([^"]+)"', info)
        found.append(Block(language, title and title.group(1), body, bool(run)))
    return found


def inline_commands(page: Path) -> list[list[str]]:
    """Return the commands in the text itself, except forms such as `robustfpd COMMAND`."""
    text = FENCE.sub("", page.read_text())
    found = [shlex.split(command) for command in re.findall(r"`(robustfpd [^`]+)`", text)]
    return [words for words in found if not any(re.fullmatch(r"\W*[A-Z_]{3,}\W*", word) for word in words)]


def name_of(page: Path) -> str:
    """Return a page's name in test ids."""
    return str(page.relative_to(DOCS if page.is_relative_to(DOCS) else ROOT))
