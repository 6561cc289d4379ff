"""Figures of the report: SVG text that takes its colours from the page, so that it is readable in light and dark."""

from __future__ import annotations

import io
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
from robustfpd.report.metrics import NORMS, after_each_attack
from robustfpd.training import EpochMetrics

COLOURS = ("#2f7fc1", "#d1495b", "#2a9461", "#9a6fb0", "#b9751b", "#6b7f8c")
"""Three to one against white and against near black."""
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
INK = "#010203"
"""Stands for the page's text colour."""
MOST_LINES = 9
WIDE, LOW = (5.8, 3.5), (5.8, 4.4)
FEW = 12
"""Epochs up to which each has a dot of its own: a single one would not be seen."""
NUMBERED = 12
"""Up to so many classes a confusion matrix has its counts written in."""


def accuracy_curves(records: Sequence[EvaluationRecord], names: Sequence[str]) -> str:
    """Worst-case accuracy against eps, a line per network, with its 95 % band. Returns SVG."""
    with _figure(WIDE) as (figure, axes):
        for index, (record, name) in enumerate(zip(records, names, strict=True)):
            points = [(0.0, record.clean)] + [(w.eps, w.robust) for w in record.worst_case]
            eps = [e for e, _ in points]
            colour, style, marker = _look(index)
            axes.plot(eps, [100 * p.value for _, p in points], style, color=colour, marker=marker, label=name)
            axes.fill_between(
                eps, [100 * p.low for _, p in points], [100 * p.high for _, p in points], color=colour, alpha=0.15,
                linewidth=0,
            )  # fmt: skip
        _finish(axes, f"eps ({NORMS[records[0].norm]})", "accuracy under the worst attack (%)")
        return _svg(figure, "accuracy")


def attack_curves(record: EvaluationRecord, key: str) -> str:
    """Accuracy against eps, a line per attack: alone where it tried every image, else after it and those before it.

    Attacks that turned nothing more would draw the same line again and are left out; of more than nine, the hardest
    are drawn. Returns SVG.
    """
    curves = after_each_attack(record)
    if not record.every_attack:
        busy = {a.attack for a in record.attacks if a.misclassified}
        curves = {label: points for label, points in curves.items() if label in busy} or dict([*curves.items()][:1])
    hardest = sorted(curves, key=lambda label: curves[label][-1][1])[:MOST_LINES]
    curves = {label: points for label, points in curves.items() if label in hardest}
    with _figure(WIDE) as (figure, axes):
        for index, (label, points) in enumerate(curves.items()):
            eps, values = [0.0, *(e for e, _ in points)], [record.clean.value, *(v for _, v in points)]
            colour, style, marker = _look(index)
            shown = label if record.every_attack else f"after {label}"
            axes.plot(eps, [100 * v for v in values], style, color=colour, marker=marker, markersize=4, label=shown)
        _finish(axes, f"eps ({NORMS[record.norm]})", "accuracy (%)", below=True)
        return _svg(figure, f"attacks-{key}")


def training_curves(histories: Mapping[str, Sequence[EpochMetrics]], planned: Mapping[str, int]) -> str:
    """Validation accuracy, and the share of batches with the gate open, over the planned epochs. Returns SVG."""
    gated = {n: h for n, h in histories.items() if any(m.restoration is not None for m in h)}
    with _figure(LOW if gated else WIDE, rows=2 if gated else 1) as (figure, axes):
        panels = list(figure.axes)
        for index, (name, history) in enumerate(histories.items()):
            colour, style, _ = _look(index)
            share = [100 * (m.epoch + 1) / planned[name] for m in history]
            marker = "o" if len(history) <= FEW else None
            accuracy = [100 * m.validation_accuracy for m in history]
            axes.plot(share, accuracy, style, color=colour, marker=marker, label=name)
            robust = [(s, m.validation_robust_accuracy) for s, m in zip(share, history, strict=True)]
            known = [(s, 100 * r) for s, r in robust if r is not None]
            if known:
                axes.plot(*zip(*known, strict=True), ":", color=colour, label=f"{name}, under PGD-10")
            if name in gated:
                panels[1].plot(share, [100 * m.gate_open for m in history], style, color=colour, marker=marker)
        axes.set_xlim(0, 102)
        _finish(axes, "" if gated else "share of the planned epochs (%)", "validation\naccuracy (%)")
        if gated:
            _finish(panels[1], "share of the planned epochs (%)", "batches with the\ngate open (%)")
        return _svg(figure, "training")


def confusion(counts: npt.NDArray[np.int64], names: Sequence[str]) -> str:
    """How many images of each class (rows) were taken for which (columns). Returns SVG."""
    classes = len(counts)
    side = 4.8 if classes <= NUMBERED else 5.4
    with _figure((side + 0.8, side)) as (figure, axes):
        share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        colours = np.zeros((*counts.shape, 4))
        colours[..., :3] = matplotlib.colors.to_rgb(COLOURS[0])
        colours[np.eye(classes, dtype=bool), :3] = matplotlib.colors.to_rgb(COLOURS[2])
        colours[..., 3] = 0.85 * np.sqrt(share)
        axes.imshow(colours, interpolation="nearest")
        if classes <= NUMBERED:
            axes.set_xticks(range(classes), [_short(n) for n in names], rotation=0 if _narrow(names) else 60)
            axes.set_yticks(range(classes), [_short(n) for n in names])
            for (row, column), count in np.ndenumerate(counts):
                if count:
                    axes.text(column, row, str(count), ha="center", va="center", color=INK, fontsize=9)
        _label(axes, "class under attack", "true class")
        return _svg(figure, "confusion")


def loss_landscape(surface: LossLandscape) -> str:
    """The margin around an image; the line is where the class changes. Returns SVG."""
    grid = np.array(surface.margin)
    most = max(float(np.abs(grid).max()), 1e-6)
    with _figure((5.8, 4.2)) as (figure, axes):
        extent = (surface.along[0], surface.along[-1], surface.across[0], surface.across[-1])
        image = axes.imshow(
            grid, origin="lower", extent=extent, cmap="RdBu_r", norm=TwoSlopeNorm(0, -most, most), aspect="auto",
            interpolation="bilinear",
        )  # fmt: skip
        if grid.min() < 0 < grid.max():
            axes.contour(surface.along, surface.across, grid, levels=[0], colors="#111111", linewidths=1.5)
        for place, marker, text in ((0, "o", "image"), (1, "X", "adversarial")):
            axes.plot(place, 0, marker, color="#111111", markersize=8, markerfacecolor="white")
            axes.annotate(
                text, (place, 0), (0, 9), textcoords="offset points", ha="center", fontsize=9, color="#111111"
            )  # fmt: skip
        _label(axes, "towards the adversarial image", "in a random direction of the same size")
        bar = figure.colorbar(image, ax=axes)
        bar.set_label("best wrong logit minus the true one", color=INK)
        bar.ax.tick_params(colors=INK)
        return _svg(figure, "surface")


@contextmanager
def _figure(size: tuple[float, float], rows: int = 1) -> Iterator[tuple[Figure, Axes]]:
    """A figure whose text is text, in the page's font and colour."""
    settings: dict[Any, Any] = {
        "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "grid.color": INK, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 12, "lines.linewidth": 1.8,
        "lines.markersize": 5.5, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        panels = np.atleast_1d(figure.subplots(rows, 1, sharex=rows > 1))
        for axes in panels:
            axes.patch.set_alpha(0)
        yield figure, panels[0]


def _look(index: int) -> tuple[str, str, str]:
    """Colour, style and marker of a line, no two alike in 24."""
    turn = index // len(COLOURS)
    return COLOURS[index % len(COLOURS)], STYLES[(index + turn) % len(STYLES)], MARKERS[(index + turn) % len(MARKERS)]


def _finish(axes: Axes, x: str, y: str, *, below: bool = False) -> None:
    _label(axes, x, y)
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.18)
    if axes.get_legend_handles_labels()[0]:
        legend = axes.legend(fontsize=10, frameon=False, labelcolor=INK)
        if below and len(axes.get_lines()) > 4:
            legend.set_loc("upper center")
            legend.set_bbox_to_anchor((0.45, -0.24))


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _short(name: str) -> str:
    return name if len(name) <= 12 else f"{name[:11]}…"


def _narrow(names: Sequence[str]) -> bool:
    return all(len(name) <= 2 for name in names)


def _svg(figure: Figure, key: str) -> str:
    """SVG to put into a page that holds others: its ids are its own, its ink is the page's."""
    buffer = io.StringIO()
    with matplotlib.rc_context(
        {"svg.hashsalt": "robustfpd", "svg.fonttype": "none"}
    ):  # the same twice is the same text
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r"url\(#", f"url(#{key}-", text)
    text = re.sub(r'href="#', f'href="#{key}-', text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
