"""Progress displays for training and attacks in a terminal; plain lines when the output is piped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
def training_display(console: Console, title: str, heading: str) -> Iterator[Observer]:
    """Show a training: a bar with phase, gate, losses, accuracy, speed and time left; a line per epoch.

    Of two losses `a/b` the second is phase 2's. The heading is printed after the first batch.
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
                console.print(heading, highlight=False, markup=False)
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
            columns, line = _epoch_lines(metrics)
            if not headed:
                console.print(columns, highlight=False)
                headed = True
            console.print(line + ("  best" if best else ""), highlight=False)
            live.refresh()

        yield Observer(on_batch=on_batch, on_epoch=on_epoch)


@contextmanager
def evaluation_display(console: Console, title: str) -> Iterator[EvaluationObserver]:
    """Show an evaluation: the attack, its radius and the number of survivors."""
    from robustfpd.evaluation import EvaluationObserver, EvaluationProgress

    with console.status(f"{title}: clean accuracy") as status:

        def on_attack(progress: EvaluationProgress) -> None:
            status.update(
                f"{title}: {progress.attack} at eps {progress.eps:.4g} ({progress.number}/{progress.total}), "
                f"{progress.survivors} survivors"
            )

        yield EvaluationObserver(on_attack=on_attack)


@contextmanager
def networks_display(console: Console, networks: Sequence[str]) -> Iterator[Callable[[str, str, float, bool], None]]:
    """Show a bar for each of several networks; without a terminal, a line for each milestone.

    Yields:
        A function of a network, a text, the fraction done, and whether this is a milestone.
    """
    columns = TextColumn("{task.description}"), BarColumn(bar_width=12), TextColumn("{task.fields[text]}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = {name: bars.add_task(name, total=1.0, text="waiting") for name in networks}

        def show(network: str, text: str, done: float, milestone: bool) -> None:
            bars.update(tasks[network], completed=done, text=text)
            if milestone and not console.is_terminal:
                console.print(f"{network}: {text}", highlight=False, markup=False)

        yield show


def _phase(progress: TrainingProgress) -> str:
    """Phase and gate; the undefended baseline has neither."""
    step = progress.step
    if step.first.restoration is None:
        return ""
    if step.gate_open is None:
        return "  backbone alone"
    gate = "gate open" if step.gate_open else "gate shut"
    if step.adversarial is not None:
        return f"  adversarial, {gate}"
    return f"  phase{'s 1+2' if step.second is not None else ' 1'}, {gate}"


def _details(progress: TrainingProgress) -> str:
    step, second = progress.step, progress.step.second
    accuracy = 100 * float(progress.correct) / progress.seen
    parts = [f"CE {_pair(step.first.ce, None if second is None else second.ce)}"]
    if step.adversarial is not None:
        parts.append(f"adversarial CE {float(step.adversarial.ce):.2g}")
    if step.first.restoration is not None:
        parts.append(f"L2 {_pair(step.first.restoration, None if second is None else second.restoration)}")
    parts += [f"acc {accuracy:.1f} %", f"{progress.images_per_second:.0f} img/s"]
    return "  ".join([*parts, f"{duration(progress.seconds_left)} left"])


def _pair(first: object, second: object) -> str:
    """A loss in phase 1 and, where there is one, in phase 2."""
    values = [f"{float(v):.2g}" for v in (first, second) if v is not None]  # type: ignore[arg-type]
    return "/".join(values)


def _epoch_lines(m: EpochMetrics) -> tuple[str, str]:
    """Return the heading of an epoch's line and the line; the undefended baseline has neither phases nor a gate."""
    cells = [("epoch", 5, str(m.epoch + 1)), ("cross-entropy", 15, _pair(m.ce, m.second_ce))]
    if m.restoration is not None:
        cells.append(("L2 restored", 15, _pair(m.restoration, m.second_restoration)))
        since = f" from batch {m.gate_opened}" if (m.gate_opened or 1) > 1 else ""
        share = "not yet" if m.gate_open is None else f"{100 * m.gate_open:.0f} %{since}"
        cells.append(("gate open", 9, share))
    cells.append(("validation", 10, f"{100 * m.validation_accuracy:.2f} %"))
    if m.validation_robust_accuracy is not None:
        cells.append(("PGD-10", 7, f"{100 * m.validation_robust_accuracy:.1f} %"))
    cells.append(("img/s", 6, f"{m.images_per_second:.0f}"))
    heading = "  ".join(f"{name:>{width}}" for name, width, _ in cells)
    return heading, "  ".join(f"{value:>{width}}" for _, width, value in cells)


def duration(seconds: float) -> str:
    """Seconds as `5 s`, `4:05` or `2:04:05`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"
