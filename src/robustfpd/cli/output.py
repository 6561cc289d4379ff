"""Where a command's words go: to a person, or to a machine that asked for JSON."""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text


class Output:
    """What a command says: words and tables for people, one JSON object under `--json`, nothing under `--quiet`.

    Errors and warnings go to standard error whatever was asked for.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.console = Console(soft_wrap=True, quiet=json or quiet)
        """For displays that write to a console; silent where nothing may be said."""

    def say(self, *parts: RenderableType) -> None:
        """Tell a person: text as it is (no markup, no colouring of numbers), tables and the like."""
        for part in parts:
            if isinstance(part, Table) and not self.console.is_terminal:
                self._plain(part)
            else:  # a string may hold a command to copy, which no line break may cut
                wrapped = isinstance(part, Text) and self.console.is_terminal
                self.console.print(part, highlight=False, markup=False, soft_wrap=not wrapped)

    def _plain(self, table: Table) -> None:
        """A table without lines, boxes and spaces at the ends, for files and pipes."""
        table.box = None
        with self.console.capture() as kept:
            self.console.print(table, highlight=False, soft_wrap=False)
        self.console.out("\n".join(line.rstrip() for line in kept.get().rstrip().splitlines()), highlight=False)

    def explain(self, text: str) -> None:
        """Tell a person sentences, broken between words where the terminal ends; piped, they stay on one line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def result(self, values: Mapping[str, Any]) -> None:
        """Tell a machine, under `--json` only: the one object on standard output."""
        if self.json:
            print(json_format.dumps(dict(values), indent=2, default=str), flush=True)
