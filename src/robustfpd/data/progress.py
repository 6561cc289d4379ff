"""What a terminal shows while images are decoded for the first time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from robustfpd.data.described import OnProgress

PATIENCE = 2.0
"""Seconds before anything is shown: most data sets are quicker."""


@contextmanager
def decoding_shown(title: str, on_progress: OnProgress | None) -> Iterator[OnProgress]:
    """Yield `on_progress`, or else a bar on standard error where that is a terminal."""
    if on_progress is not None or not sys.stderr.isatty():
        yield on_progress or (lambda done, total: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(f"decoding {title}, once")
    begun, shown = time.monotonic(), False

    def show(done: int, total: int) -> None:
        nonlocal shown
        if not shown and time.monotonic() - begun > PATIENCE:
            bar.start()
            shown = True
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()
