from __future__ import annotations

import base64
import io
from html import unescape
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from robustfpd.report import figures
from robustfpd.report.html import Gallery
from robustfpd.training import EpochMetrics

if TYPE_CHECKING:
    from tests.report.conftest import MakeRecord


def _texts(svg: str) -> list[str]:
    """What matplotlib notes beside each text that it draws as outlines."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.fromstring(svg, parser)
    return [(e.text or "").strip() for e in root.iter() if callable(e.tag)]


def test_curves_are_svg_that_names_axes_and_networks(make_record: MakeRecord) -> None:
    svg = figures.accuracy_curves([make_record("FPD"), make_record("plain twin")])
    assert svg.startswith("<svg")
    assert {"FPD", "plain twin", "eps (linf)", "accuracy under the worst attack (%)"} <= set(_texts(svg))


def test_attack_curves_draw_every_attack_even_of_the_longest_suite(make_record: MakeRecord) -> None:
    names = tuple(f"attack {i}" for i in range(9))
    svg = figures.attack_curves(make_record("FPD", attacks=names))
    assert [t for t in _texts(svg) if t.startswith("attack")] == list(names)


def test_accuracy_and_training_curves_draw_every_network(make_record: MakeRecord, history: list[EpochMetrics]) -> None:
    names = [f"network {i}" for i in range(9)]
    for svg in (
        figures.accuracy_curves([make_record(n) for n in names]),
        figures.training_curves(dict.fromkeys(names, history)),
    ):
        assert [t for t in _texts(svg) if t.startswith("network")] == names


def test_no_two_of_sixteen_lines_look_the_same() -> None:
    assert len({figures._look(i) for i in range(16)}) == 16


def test_figures_are_the_same_twice(make_record: MakeRecord, history: list[EpochMetrics], gallery: Gallery) -> None:
    records = [make_record("FPD"), make_record("plain twin", (90, 3))]
    for _ in range(2):
        first, second = (
            (
                figures.accuracy_curves(records),
                figures.attack_curves(records[0]),
                figures.training_curves({"FPD": history}),
                figures.gallery(gallery.rows, gallery.titles),
            )
            for _ in range(2)
        )
        assert first == second
    assert figures.accuracy_curves(records) != figures.accuracy_curves(records[:1])


def test_curves_pass_through_the_points(
    monkeypatch: pytest.MonkeyPatch, make_record: MakeRecord, history: list[EpochMetrics]
) -> None:
    drawn: list[tuple[list[float], list[float]]] = []
    finish = figures._finish

    def keep(axes: Axes, x: str, y: str) -> None:
        drawn.extend(
            (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()) for line in axes.lines
        )
        finish(axes, x, y)

    monkeypatch.setattr(figures, "_finish", keep)
    figures.accuracy_curves([make_record("FPD", (150, 60))])
    figures.attack_curves(make_record("FPD", (150, 60)))
    figures.training_curves({"FPD": history})
    radii = pytest.approx([0, 0.1, 0.2])
    assert [xs == radii for xs, _ in drawn[:3]] == [True] * 3
    assert drawn[0][1] == pytest.approx([95, 75, 30])
    assert drawn[1][1] == pytest.approx([95, 75, 30])
    assert drawn[2][1] == pytest.approx([95, 75.5, 30.5])
    assert drawn[3][0] == pytest.approx([100 / 3, 200 / 3, 100])
    assert drawn[3][1] == pytest.approx([30, 50, 70])


@pytest.mark.parametrize("name", ['<b>&amp; "x"', "$\\frac$", "_hidden", "costs $5 or $6"])
def test_any_name_can_be_drawn(make_record: MakeRecord, name: str) -> None:
    svg = figures.accuracy_curves([make_record(name), make_record("b")])
    assert "<b>" not in svg
    assert "b" in _texts(svg)
    assert unescape(_texts(svg)[-2]) == name


def test_a_record_without_accuracies_per_attack_has_a_figure(make_record: MakeRecord) -> None:
    record = make_record("FPD")
    bare = tuple(a.model_copy(update={"accuracy": None}) for a in record.attacks)
    assert figures.attack_curves(record.model_copy(update={"attacks": bare})).startswith("<svg")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gallery_is_a_png_with_a_cell_per_image(channels: int) -> None:
    images = torch.rand(3, 2, channels, 4, 4, generator=torch.Generator().manual_seed(0)) * 1.4 - 0.2
    rows = [figures.GalleryRow(tuple(row), ("a", "b")) for row in images]
    head, _, body = figures.gallery(rows, ("clean", "adversarial")).partition(",")
    assert head == "data:image/png;base64"
    picture = plt.imread(io.BytesIO(base64.b64decode(body, validate=True)))
    assert picture.shape[:2] == pytest.approx((1.85 * 3 * 110, 1.6 * 2 * 110), abs=1)


def test_a_row_with_a_caption_missing_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="zip"):
        figures.gallery([figures.GalleryRow((torch.zeros(1, 2, 2),), ())], ("clean",))


def test_no_figure_stays_open(make_record: MakeRecord, history: list[EpochMetrics], gallery: Gallery) -> None:
    before = plt.get_fignums()
    figures.accuracy_curves([make_record("FPD")])
    figures.attack_curves(make_record("FPD"))
    figures.training_curves({"FPD": history})
    figures.gallery(gallery.rows, gallery.titles)
    assert plt.get_fignums() == before
