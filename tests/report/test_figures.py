from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import pytest

from robustfpd.evaluation.gallery import read_gallery
from robustfpd.report import figures
from robustfpd.training import EpochMetrics

if TYPE_CHECKING:
    from tests.report.conftest import MakeRecord

SVG = "{http://www.w3.org/2000/svg}"


def _texts(svg: str) -> list[str]:
    return [(e.text or "").strip() for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_curves_are_svg_that_names_axes_and_networks(make_record: MakeRecord) -> None:
    svg = figures.accuracy_curves([make_record("FPD"), make_record("undefended baseline")])
    assert svg.startswith("<svg")
    assert {"FPD", "undefended baseline", "eps (L∞)", "accuracy under the worst attack (%)"} <= set(_texts(svg))


def test_attack_curves_draw_every_successful_attack(make_record: MakeRecord) -> None:
    names = tuple(f"attack {i}" for i in range(9))
    svg = figures.attack_curves(make_record("FPD", attacks=names), "0")
    assert [t for t in _texts(svg) if t.startswith("attack")] == list(names)
    many = tuple(f"attack {i}" for i in range(14))
    record = make_record("FPD", attacks=many, every_attack=False)
    without_success = {"attack 3", "attack 5"}
    attacks = tuple(
        a.model_copy(update={"misclassified": 0}) if a.attack in without_success else a for a in record.attacks
    )
    svg = figures.attack_curves(record.model_copy(update={"attacks": attacks}), "0")
    shown = [t.removeprefix("after ") for t in _texts(svg) if t.startswith("after ")]
    assert shown == [n for n in many if n not in without_success][: figures.MAX_LINES]


def test_training_curves_show_the_gate_of_networks_that_have_one(history: tuple[EpochMetrics, ...]) -> None:
    baseline = tuple(EpochMetrics(**{**vars(m), "restoration": None}) for m in history)
    gate = "gate open (%)"
    assert gate in _texts(figures.training_curves({"FPD": history, "baseline": baseline}, {"FPD": 3, "baseline": 3}))
    assert gate not in _texts(figures.training_curves({"baseline": baseline}, {"baseline": 50}))


def test_figures_on_one_page_share_no_ids_and_take_the_page_s_colour(
    make_record: MakeRecord, history: tuple[EpochMetrics, ...]
) -> None:
    record = make_record("FPD")
    made = [
        figures.accuracy_curves([record]), figures.attack_curves(record, "0"),
        figures.attack_curves(record, "1"), figures.training_curves({"FPD": history}, {"FPD": 3}),
        figures.confusion(np.eye(3, dtype=np.int64), ["a", "b", "c"]),
    ]  # fmt: skip
    ids = [i for svg in made for i in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in made:
        named = set(re.findall(r'\bid="([^"]+)"', svg))
        assert set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg)) <= named
        assert "currentColor" in svg
        assert figures.TEXT_COLOUR not in svg
        assert "<metadata" not in svg


def test_the_same_figure_twice_is_the_same_text(make_record: MakeRecord) -> None:
    one, two = (figures.accuracy_curves([make_record("FPD")]) for _ in range(2))
    assert one == two


def test_a_confusion_matrix_has_its_counts_written_in_where_they_fit() -> None:
    counts = np.array([[11, 0], [3, 5]])
    assert {"11", "3", "5", "cat", "a very long…"} <= set(
        _texts(figures.confusion(counts, ["cat", "a very long name"]))
    )
    large = np.full((40, 40), 77)
    assert "77" not in _texts(figures.confusion(large, [str(i) for i in range(40)]))


def test_the_landscape_marks_image_and_adversarial_point(measured: Path) -> None:
    landscape = read_gallery(measured / "record.gallery").landscape
    assert landscape is not None
    assert {"image", "adversarial", "towards the adversarial image"} <= set(_texts(figures.landscape_figure(landscape)))
    flat = landscape.model_copy(update={"margin": tuple((0.0,) * 21 for _ in range(21))})
    assert "image" in _texts(figures.landscape_figure(flat))


@pytest.mark.parametrize("name", ["$x^2$", "a < b & c", "</svg><script>x</script>", "--> $\\frac$"])
def test_names_with_markup_are_text(make_record: MakeRecord, name: str) -> None:
    assert name in _texts(figures.accuracy_curves([make_record(name)]))


def test_lines_differ_without_colour() -> None:
    styles = [figures.line_style(i) for i in range(24)]
    assert len(set(styles)) == 24
    assert len({(style, marker) for _, style, marker in styles[:6]}) == 6
