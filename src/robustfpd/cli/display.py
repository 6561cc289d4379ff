"""Progress displays for training and attacks in a terminal; plain lines when the output is piped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

if TYPE_CHECKING:
    from robustfpd.evaluation import EvaluationObserver
    from robustfpd.training import EpochMetrics, Observer
    from robustfpd.training import Progress as TrainingProgress

REFRESH_SECONDS = 0.25


@contextmanager
def training_display(console: Console, title: str, heading: str | None = None) -> Iterator[Observer]:
    """Show a training: a bar with phase, gate, losses, accuracy, speed and time left; a line per epoch.

    Where there are two losses, `a/b`, the second is phase 2's. Made for terminals from 80 columns up. The heading, by
    default the title, is shown as soon as a batch is done: data and settings were in order.
    """
    import time

    from robustfpd.training import Observer

    bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=None), TaskProgressColumn(), console=console)
    task = bar.add_task(title)
    details = Text(no_wrap=False, overflow="fold")  # nothing is cut off
    shown = 0.0
    begun = headed = False
    with Live(Group(bar, details), console=console, transient=True, auto_refresh=False, redirect_stderr=False) as live:

        def on_batch(progress: TrainingProgress) -> None:
            nonlocal shown, begun
            if not begun:
                console.print(heading or title, highlight=False, markup=False)
                begun = True
            now = time.monotonic()
            if now - shown < REFRESH_SECONDS or not console.is_terminal:
                return
            shown = now
            done = progress.epoch * progress.batches + progress.batch
            description = f"{title}  epoch {progress.epoch + 1}/{progress.epochs}{_phase(progress)}"
            bar.update(task, description=description, total=progress.epochs * progress.batches, completed=done)
            details.plain = _details(progress)
            live.refresh()

        def on_epoch(metrics: EpochMetrics, best: bool) -> None:
            nonlocal headed
            cells = _epoch_cells(metrics)
            if not headed:
                console.print(_row(cells, heading=True), highlight=False)
                headed = True
            line = _row(cells, heading=False) + ("  best" if best else "")
            console.print(line, highlight=False)
            live.refresh()

        yield Observer(on_batch=on_batch, on_epoch=on_epoch)


@contextmanager
def evaluation_display(console: Console, title: str) -> Iterator[EvaluationObserver]:
    """Show an evaluation: which attack runs at which radius, and the number of survivors."""
    from robustfpd.evaluation import EvaluationObserver, EvaluationProgress

    with console.status(f"{title}: clean accuracy") as status:

        def on_attack(progress: EvaluationProgress) -> None:
            status.update(
                f"{title}: {progress.attack} at eps {progress.eps:.4g} ({progress.number}/{progress.total}), "
                f"{progress.survivors} survivors"
            )

        yield EvaluationObserver(on_attack=on_attack)


@dataclass(frozen=True)
class Progressed:
    """Progress of one of several networks."""

    network: str
    text: str
    done: float
    """Fraction."""
    milestone: bool
    """Printed where there are no bars, too."""


@contextmanager
def networks_display(console: Console, networks: Sequence[str]) -> Iterator[Callable[[Progressed], None]]:
    """Show a bar for each of several networks; without a terminal, a line for each milestone."""
    columns = TextColumn("{task.description}"), BarColumn(bar_width=12), TextColumn("{task.fields[text]}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = {name: bars.add_task(name, total=1.0, text="waiting") for name in networks}

        def show(progressed: Progressed) -> None:
            bars.update(tasks[progressed.network], completed=progressed.done, text=progressed.text)
            if progressed.milestone and not console.is_terminal:
                console.print(f"{progressed.network}: {progressed.text}", highlight=False, markup=False)

        yield show


def _phase(progress: TrainingProgress) -> str:
    """Phase and gate; the undefended baseline has neither."""
    step = progress.step
    if step.first.restoration is None:
        return ""
    gate = "gate open" if step.gate_open else "gate shut"
    if step.adversarial is not None:
        return f"  adversarial, {gate}"
    if not step.gate_open:
        return f"  phase 1, {gate}"
    return f"  phases 1+2, {gate}" if step.second is not None else f"  clean epoch, {gate}"


def _details(progress: TrainingProgress) -> str:
    step, second = progress.step, progress.step.second
    accuracy = 100 * float(progress.correct) / progress.seen
    parts = [f"CE {_pair(step.first.ce, None if second is None else second.ce)}"]
    if step.adversarial is not None:
        parts.append(f"adversarial CE {float(step.adversarial.ce):.2g}")
    if step.first.restoration is not None:
        parts.append(f"L2 {_pair(step.first.restoration, None if second is None else second.restoration)}")
    parts += [
        f"acc {accuracy:.1f} %",
        f"{progress.images_per_second:.0f} img/s",
        f"{duration(progress.seconds_left)} left",
    ]
    return "  ".join(parts)


def _pair(first: object, second: object) -> str:
    """A loss in phase 1 and, where there is one, in phase 2."""
    values = [f"{float(v):.2g}" for v in (first, second) if v is not None]  # type: ignore[arg-type]
    return "/".join(values)


def _epoch_cells(m: EpochMetrics) -> list[tuple[str, str]]:
    """What an epoch's line shows, with its headings; the undefended baseline has neither phases nor a gate."""
    cells = [("epoch", str(m.epoch + 1)), ("cross-entropy", _pair(m.ce, m.second_ce))]
    if m.restoration is not None:
        cells += [
            ("L2 restored", _pair(m.restoration, m.second_restoration)),
            ("gate open", f"{100 * m.gate_open:.0f} %"),
        ]
    cells.append(("validation", f"{100 * m.validation_accuracy:.2f} %"))
    if m.validation_robust_accuracy is not None:
        cells.append(("PGD-10", f"{100 * m.validation_robust_accuracy:.1f} %"))
    return [*cells, ("img/s", f"{m.images_per_second:.0f}")]


COLUMNS = {
    "PGD-10": 7,
    "epoch": 5,
    "cross-entropy": 15,
    "L2 restored": 15,
    "gate open": 9,
    "validation": 10,
    "img/s": 6,
}


def _row(cells: list[tuple[str, str]], heading: bool) -> str:
    """Cells right-aligned under their headings."""
    return "  ".join(f"{name if heading else value:>{COLUMNS[name]}}" for name, value in cells)


def duration(seconds: float) -> str:
    """Seconds as `5 s`, `4:05` or `2:04:05`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
