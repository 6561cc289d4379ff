"""Results of finished checks, written during the evaluation, so that it can be resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robustfpd.io import write_text, writing

Passes = tuple[int, int]
"""Images that went forward and backward."""


class SavedChecks:
    """Results of finished checks by name, with their passes; a line of JSON each in a file if one is opened."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.results: dict[str, Any] = {}
        self.passes: dict[str, Passes] = {}
        """Of the results that were read, by name: another process made these passes."""

    def open(self, path: Path, *, resumed: bool) -> None:
        """Write results to this file; if `resumed`, read those that it holds."""
        lines = _lines(path) if resumed and path.is_file() else []
        self.results = {line["name"]: line["result"] for line in lines}
        self.passes = {line["name"]: (line["forward"], line["backward"]) for line in lines}
        with writing(path):
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))  # without an incomplete last line
        self.path = path

    def resume(self, name: str, compute: Callable[[], Any], passes: Callable[[], Passes]) -> Any:
        """Return the saved result, or compute and save it.

        Args:
            name: unique in an evaluation.
            compute: returns the result, which JSON can hold.
            passes: returns the passes of this process so far.
        """
        if name not in self.results:
            before = passes()
            result = compute()
            forward, backward = (now - then for now, then in zip(passes(), before, strict=True))
            self.results[name] = result
            self._write({"name": name, "forward": forward, "backward": backward, "result": result})
        return self.results[name]

    def finish(self) -> None:
        """Delete the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is not None:
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the results in a file up to the first unreadable line."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            lines.append({key: line[key] for key in ("name", "forward", "backward", "result")})
        except (ValueError, KeyError, TypeError):
            break
    return lines
