"""Figures of the report, as SVG and PNG text to embed."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from robustfpd.evaluation import EvaluationRecord
from robustfpd.training import EpochMetrics

COLOURS = ("#0b6e4f", "#c0392b", "#7f6a93", "#2c6fbb")
STYLES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class GalleryRow:
    """One image on its way through the defence; images C×H×W in [0, 1], captions below them."""

    images: tuple[Tensor, ...]
    captions: tuple[str, ...]


def accuracy_curves(records: Sequence[EvaluationRecord]) -> str:
    """Worst-case accuracy against eps, a line per network, with its 95 % band. Returns SVG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for index, record in enumerate(records):
        colour, style = _look(index)
        points = [(0.0, record.clean)] + [(w.eps, w.robust) for w in record.worst_case]
        eps = [e for e, _ in points]
        axes.plot(eps, [100 * p.value for _, p in points], style, color=colour, marker="o", label=record.subject)
        axes.fill_between(
            eps, [100 * p.low for _, p in points], [100 * p.high for _, p in points], color=colour, alpha=0.15
        )  # fmt: skip
    _finish(axes, f"eps ({records[0].norm})", "accuracy under the worst attack (%)")
    return _svg(figure)


def attack_curves(record: EvaluationRecord) -> str:
    """Accuracy against eps under each attack alone, for one network. Returns SVG."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    labels = list(dict.fromkeys(a.attack for a in record.attacks if a.accuracy is not None))
    for index, label in enumerate(labels):
        colour, style = _look(index)
        results = [a for a in record.attacks if a.attack == label and a.accuracy is not None]
        eps = [0.0] + [a.eps for a in results]
        values = [record.clean.value] + [a.accuracy.value for a in results if a.accuracy is not None]
        axes.plot(eps, [100 * v for v in values], style, color=colour, marker="o", label=label)
    _finish(axes, f"eps ({record.norm})", "accuracy (%)")
    return _svg(figure)


def training_curves(histories: dict[str, list[EpochMetrics]]) -> str:
    """Validation accuracy by share of the training, a line per network. Returns SVG."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, history) in enumerate(histories.items()):
        colour, style = _look(index)
        share = [100 * (m.epoch + 1) / len(history) for m in history]
        axes.plot(share, [100 * m.validation_accuracy for m in history], style, color=colour, label=name)
    _finish(axes, "share of the training done (%)", "validation accuracy (%)")
    return _svg(figure)


def gallery(rows: Sequence[GalleryRow], titles: Sequence[str]) -> str:
    """A grid of images, a row each. Returns a PNG as a data address."""
    height, width = len(rows), len(titles)
    figure = Figure(figsize=(1.6 * width, 1.85 * height), layout="constrained")
    grid = figure.subplots(height, width, squeeze=False)
    for i, row in enumerate(rows):
        for j, (image, caption) in enumerate(zip(row.images, row.captions, strict=True)):
            cell = grid[i][j]
            picture = image.clamp(0, 1).permute(1, 2, 0).squeeze(-1).cpu().numpy()  # H W or H W C
            cell.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            cell.set_xlabel(caption, fontsize=8)
            if i == 0:
                cell.set_title(titles[j], fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _look(index: int) -> tuple[str, str]:
    """Colour and style of a line, no pair twice in 16."""
    return COLOURS[index % len(COLOURS)], STYLES[(index + index // len(COLOURS)) % len(STYLES)]


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(-2, 102)
    axes.grid(alpha=0.3)
    lines = axes.get_lines()
    if lines:
        legend = axes.legend(lines, [str(line.get_label()) for line in lines], fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)  # names may hold dollar signs


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "robustfpd"}):  # the same figure twice is the same text
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
