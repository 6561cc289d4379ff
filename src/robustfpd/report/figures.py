"""Figures of the report as SVG text that takes its colours from the page, so that it is readable in light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from robustfpd.evaluation import EvaluationRecord
from robustfpd.evaluation.gallery import LossLandscape
from robustfpd.evaluation.robustness import NORM_NAMES
from robustfpd.report.metrics import attack_metrics
from robustfpd.training import EpochMetrics

COLOURS = ("#2f7fc1", "#d1495b", "#2a9461", "#9a6fb0", "#b9751b", "#6b7f8c")
"""Contrast of at least 3:1 to white and to near black."""
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
TEXT_COLOUR = "#010203"
"""Placeholder that is replaced by the page's text colour."""
MAX_LINES = 9
SIZE, TALL_SIZE = (5.8, 3.5), (5.8, 4.4)
MAX_EPOCHS_WITH_MARKERS = 12
MAX_CLASSES_WITH_COUNTS = 12


def accuracy_curves(records: Sequence[EvaluationRecord]) -> str:
    """Draw worst-case accuracy against eps, a line per network, with its 95 % band. Returns SVG."""
    with _figure(SIZE) as (figure, axes):
        for index, record in enumerate(records):
            points = [(0.0, record.clean), *((worst.eps, worst.robust) for worst in record.under_attack)]
            eps = [e for e, _ in points]
            colour, style, marker = line_style(index)
            axes.plot(
                eps, [100 * p.value for _, p in points], style, color=colour, marker=marker, label=record.model_name
            )
            low, high = [100 * p.low for _, p in points], [100 * p.high for _, p in points]
            axes.fill_between(eps, low, high, color=colour, alpha=0.15, linewidth=0)
        _finish(axes, f"eps ({NORM_NAMES[records[0].norm]})", "accuracy under the worst attack (%)")
        return _svg(figure, "accuracy")


def attack_curves(record: EvaluationRecord, key: str) -> str:
    """Draw accuracy against eps, a line per attack (`AttackMetrics.accuracy`). Returns SVG.

    Attacks without a success would repeat the line before them and are left out where attacks ran one after another;
    of more than `MAX_LINES`, the strongest are drawn.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for metrics in attack_metrics(record):
        curves.setdefault(metrics.result.attack, []).append((metrics.result.eps, metrics.accuracy))
    if not record.every_attack:
        successful = {a.attack for a in record.attacks if a.misclassified}
        curves = {label: points for label, points in curves.items() if label in successful} or dict(
            [*curves.items()][:1]
        )
    strongest = sorted(curves, key=lambda label: curves[label][-1][1])[:MAX_LINES]
    curves = {label: points for label, points in curves.items() if label in strongest}
    with _figure(SIZE) as (figure, axes):
        for index, (label, points) in enumerate(curves.items()):
            eps, values = [0.0, *(e for e, _ in points)], [record.clean.value, *(v for _, v in points)]
            colour, style, marker = line_style(index)
            name = label if record.every_attack else f"after {label}"
            axes.plot(eps, [100 * v for v in values], style, color=colour, marker=marker, markersize=4, label=name)
        _finish(axes, f"eps ({NORM_NAMES[record.norm]})", "accuracy (%)", legend_below=True)
        return _svg(figure, f"attacks-{key}")


def training_curves(histories: Mapping[str, Sequence[EpochMetrics]], epochs: Mapping[str, int]) -> str:
    """Draw validation accuracy, and the fraction of batches with an open gate, over the epochs. Returns SVG.

    Args:
        histories: finished epochs by name of the run.
        epochs: configured number of epochs by name of the run.
    """
    gated = {n: h for n, h in histories.items() if any(m.restoration is not None for m in h)}
    with _figure(TALL_SIZE if gated else SIZE, rows=2 if gated else 1) as (figure, axes):
        panels = list(figure.axes)
        for index, (name, history) in enumerate(histories.items()):
            colour, style, _ = line_style(index)
            progress = [100 * (m.epoch + 1) / epochs[name] for m in history]
            marker = "o" if len(history) <= MAX_EPOCHS_WITH_MARKERS else None
            accuracy = [100 * m.validation_accuracy for m in history]
            axes.plot(progress, accuracy, style, color=colour, marker=marker, label=name)
            robust = [(p, m.validation_robust_accuracy) for p, m in zip(progress, history, strict=True)]
            measured = [(p, 100 * r) for p, r in robust if r is not None]
            if measured:
                axes.plot(*zip(*measured, strict=True), ":", color=colour, label=f"{name}, under PGD-10")
            if name in gated:
                shares = [math.nan if m.gate_open is None else 100 * m.gate_open for m in history]
                panels[1].plot(progress, shares, style, color=colour, marker=marker)
        axes.set_xlim(0, 102)
        _finish(axes, "" if gated else "epochs (% of all)", "validation\naccuracy (%)")
        if gated:
            _finish(panels[1], "epochs (% of all)", "batches with the\ngate open (%)")
        return _svg(figure, "training")


def confusion(counts: npt.NDArray[np.int64], names: Sequence[str]) -> str:
    """Draw a confusion matrix: true class by row, class under attack by column. Returns SVG."""
    classes = len(counts)
    with_counts = classes <= MAX_CLASSES_WITH_COUNTS
    side = 4.8 if with_counts else 5.4
    with _figure((side + 0.8, side)) as (figure, axes):
        fraction = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        colours = np.zeros((*counts.shape, 4))
        colours[..., :3] = matplotlib.colors.to_rgb(COLOURS[0])
        colours[np.eye(classes, dtype=bool), :3] = matplotlib.colors.to_rgb(COLOURS[2])
        colours[..., 3] = 0.85 * np.sqrt(fraction)
        axes.imshow(colours, interpolation="nearest")
        if with_counts:
            labels = [name if len(name) <= 12 else f"{name[:11]}…" for name in names]
            axes.set_xticks(range(classes), labels, rotation=0 if max(map(len, names)) <= 2 else 60)
            axes.set_yticks(range(classes), labels)
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    axes.text(column, row, str(count), ha="center", va="center", color=TEXT_COLOUR, fontsize=9)
        axes.set(xlabel="class under attack", ylabel="true class")
        return _svg(figure, "confusion")


def landscape_figure(landscape: LossLandscape) -> str:
    """Draw the margin on a plane through an image, with a line where the class changes. Returns SVG."""
    grid = np.array(landscape.margin)
    limit = max(float(np.abs(grid).max()), 1e-6)
    with _figure((5.8, 4.2)) as (figure, axes):
        extent = (landscape.along[0], landscape.along[-1], landscape.across[0], landscape.across[-1])
        image = axes.imshow(
            grid, origin="lower", extent=extent, cmap="RdBu_r", norm=TwoSlopeNorm(0, -limit, limit), aspect="auto",
            interpolation="bilinear",
        )  # fmt: skip
        if grid.min() < 0 < grid.max():
            axes.contour(landscape.along, landscape.across, grid, levels=[0], colors="#111111", linewidths=1.5)
        for x, marker, text in ((0, "o", "image"), (1, "X", "adversarial")):
            axes.plot(x, 0, marker, color="#111111", markersize=8, markerfacecolor="white")
            offset: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 9, "color": "#111111"}
            axes.annotate(text, (x, 0), (0, 9), **offset)
        axes.set(xlabel="towards the adversarial image", ylabel="in a random direction of the same norm")
        bar = figure.colorbar(image, ax=axes)
        bar.set_label("largest wrong logit minus the true one", color=TEXT_COLOUR)
        bar.ax.tick_params(colors=TEXT_COLOUR)
        return _svg(figure, "landscape")


def line_style(index: int) -> tuple[str, str, str]:
    """Return colour, line style and marker of a line; the first 24 differ from each other."""
    shift = index // len(COLOURS)
    number = index + shift
    return COLOURS[index % len(COLOURS)], LINE_STYLES[number % len(LINE_STYLES)], MARKERS[number % len(MARKERS)]


@contextmanager
def _figure(size: tuple[float, float], rows: int = 1) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure and its first axes; text stays text, in the page's font and colour."""
    settings: dict[Any, Any] = {
        "text.color": TEXT_COLOUR, "axes.edgecolor": TEXT_COLOUR, "axes.labelcolor": TEXT_COLOUR,
        "xtick.color": TEXT_COLOUR, "ytick.color": TEXT_COLOUR, "grid.color": TEXT_COLOUR, "svg.fonttype": "none",
        "font.family": "sans-serif", "font.size": 12, "lines.linewidth": 1.8, "lines.markersize": 5.5,
        "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False, "svg.hashsalt": "robustfpd",
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        panels = np.atleast_1d(figure.subplots(rows, 1, sharex=rows > 1))
        for axes in panels:
            axes.patch.set_alpha(0)
        yield figure, panels[0]


def _finish(axes: Axes, x: str, y: str, *, legend_below: bool = False) -> None:
    axes.set(xlabel=x, ylabel=y, ylim=(-3, 103))
    axes.grid(alpha=0.18)
    if axes.get_legend_handles_labels()[0]:
        legend = axes.legend(fontsize=10, frameon=False, labelcolor=TEXT_COLOUR)
        if legend_below and len(axes.get_lines()) > 4:
            legend.set_loc("upper center")
            legend.set_bbox_to_anchor((0.45, -0.24))


def _svg(figure: Figure, key: str) -> str:
    """Return SVG for a page with several figures: ids start with `key`, text has the page's colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(TEXT_COLOUR, "currentColor")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
