"""`report.html`: one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import yaml

from robustfpd.config import RunConfig
from robustfpd.evaluation import EvaluationRecord
from robustfpd.report import figures
from robustfpd.report.figures import GalleryRow
from robustfpd.training import EpochMetrics


@dataclass(frozen=True)
class Subject:
    """One network of the report."""

    config: RunConfig
    history: list[EpochMetrics]
    record: EvaluationRecord

    @property
    def name(self) -> str:
        """What tables and curves call it."""
        return self.record.subject


@dataclass(frozen=True)
class Gallery:
    """Images on their way through the first network's defence."""

    titles: tuple[str, ...]
    rows: tuple[GalleryRow, ...]
    caption: str


def write_report(
    path: Path, title: str, subjects: Sequence[Subject], gallery: Gallery, next_steps: Sequence[str]
) -> Path:
    """Write a page that compares networks; the first is the defended one.

    Args:
        path: where to write; replaced as a whole.
        title: heading.
        subjects: networks evaluated on the same images at the same radii.
        gallery: images for the grid.
        next_steps: commands to try next.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    records = [s.record for s in subjects]
    page = environment.get_template("template.html").render(
        title=title,
        subjects=subjects,
        records=records,
        first=records[0],
        summary=summary(records),
        accuracy_svg=figures.accuracy_curves(records),
        attack_svg=figures.attack_curves(records[0]) if any(a.accuracy for a in records[0].attacks) else None,
        training_svg=figures.training_curves({s.name: s.history for s in subjects}),
        gallery=gallery,
        gallery_png=figures.gallery(gallery.rows, gallery.titles),
        config=yaml.safe_dump(subjects[0].config.model_dump(mode="json"), sort_keys=False),
        next_steps=next_steps,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".new")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def summary(records: Sequence[EvaluationRecord]) -> str:
    """One sentence: how the first network does against the others where they differ most."""
    first, others = records[0], records[1:]
    if not others:
        return (
            f"{first.subject}: {first.clean} clean, {first.worst_case[-1].robust} at eps {first.worst_case[-1].eps:g}."
        )
    rival = max(others, key=lambda r: sum(w.robust.value for w in r.worst_case))
    gaps = [a.robust.value - b.robust.value for a, b in zip(first.worst_case, rival.worst_case, strict=True)]
    at = max(range(len(gaps)), key=lambda i: abs(gaps[i]))
    ours, theirs = first.worst_case[at].robust, rival.worst_case[at].robust
    if ours.low <= theirs.high and theirs.low <= ours.high:
        relation = "no clear difference: the intervals overlap"
    else:
        relation = "more" if gaps[at] > 0 else "less"
        relation = f"{relation} robust by {100 * abs(gaps[at]):.0f} points"
    return (
        f"Where they differ most, at eps {first.worst_case[at].eps:g}, {first.subject} keeps {ours} and the best "
        f"rival, {rival.subject}, {theirs}: {relation}."
    )
