"""What a run left behind, as a report finds it: whatever is missing or damaged is named, and the rest is read."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robustfpd.config import RunConfig, load_run, parse
from robustfpd.errors import InputError, first_line
from robustfpd.evaluation import EvaluationRecord, is_unfinished
from robustfpd.evaluation.gallery import GalleryIndex, gallery_folder, read_gallery
from robustfpd.evaluation.ledger import CLEAN, read_rows
from robustfpd.evaluation.record import FORMAT, LEDGER
from robustfpd.evaluation.suites import STRENGTH
from robustfpd.models import zoo
from robustfpd.report.metrics import fell
from robustfpd.report.paths import resolve
from robustfpd.training import EpochMetrics, RunFolder

UNFINISHED = ".unfinished.json"


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of a run."""

    path: Path
    record: EvaluationRecord
    shown: GalleryIndex | None
    """Its pictures; None where there are none."""
    problems: tuple[str, ...] = ()

    @property
    def strength(self) -> tuple[int, int]:
        """How much a report should make of it: the thorough ones first, then those of many images."""
        known = STRENGTH.index(self.record.suite) if self.record.suite in STRENGTH else len(STRENGTH)
        return known, -self.record.num_images


@dataclass(frozen=True)
class Source:
    """A run, or another folder with evaluations."""

    name: str
    home: Path
    """Where its report goes."""
    evaluations: tuple[Evaluated, ...] = ()
    """The strongest first."""
    config: RunConfig | None = None
    history: tuple[EpochMetrics, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)
    """Of the training."""
    problems: tuple[str, ...] = ()


def read(given: str | Path) -> Source:
    """Read a run's folder, a folder of records, one record, or the results of a network by its name.

    Raises:
        InputError: there is nothing of that name.
    """
    target = resolve(given)
    name, path, records = target.name, target.path, _records(target.results)
    if target.kind == "record":
        return _assembled(name, target.results, None, [path])
    if target.kind == "run":
        return _assembled(name, path, RunFolder(path), records)
    if target.kind == "zoo":
        source = _assembled(name, target.results, None, [*records, *_records(path / "results")])
        return dataclasses.replace(source, config=_settings(path))
    if target.kind == "factory":
        return _assembled(name, target.results, None, records)
    return _assembled(name, path, None, _records(path) or records)


def _settings(folder: Path) -> RunConfig | None:
    path = folder / zoo.SETTINGS
    return load_run(path) if path.is_file() else None


def _records(folder: Path) -> list[Path]:
    """Files of a folder that are, or should be, records: those of evaluations that were not finished as well."""
    if not folder.is_dir():
        return []
    names = {p.name.removesuffix(UNFINISHED).removesuffix(".json") for p in folder.glob("*.json")}
    names |= {p.name.removesuffix(LEDGER) for p in folder.glob(f"*{LEDGER}")}
    paths = [folder / f"{name}.json" for name in sorted(names)]
    return [p for p in paths if is_unfinished(p) or _may_be_record(p)]


def _may_be_record(path: Path) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return path.with_suffix(LEDGER).is_file()  # a record that was damaged, not somebody else's file
    return isinstance(values, dict) and "worst_case" in values


def _assembled(name: str, home: Path, run: RunFolder | None, paths: list[Path]) -> Source:
    evaluations, problems = [], []
    for path in paths:
        try:
            evaluations.append(_evaluated(path))
        except InputError as error:
            problems.append(str(error))
    if not paths:
        problems.append(f"{name} was not evaluated: run `robustfpd evaluate {name}`")
    config: RunConfig | None = None
    history: tuple[EpochMetrics, ...] = ()
    environment: dict[str, Any] = {}
    if run is not None:
        try:
            config = run.config()
        except InputError as error:
            problems.append(f"settings: {error}")
        history, lost = _history(run.metrics_file)
        environment = _json(run.path / "environment.json")
        problems += lost
    evaluations.sort(key=lambda e: e.strength)
    return Source(name, home, tuple(evaluations), config, history, environment, tuple(problems))


def _evaluated(path: Path) -> Evaluated:
    """Read a record; without its ledger where that is damaged, without pictures where there are none."""
    if is_unfinished(path) or not path.is_file():
        raise InputError(_so_far(path))
    problems = []
    try:
        record = EvaluationRecord.load(path)
        if not record.ledger:
            problems.append(f"{path.with_suffix(LEDGER)} is missing: no confusion, norms and queries of single images")
    except InputError as error:
        record = _without_ledger(path, error)
        ledger = path.with_suffix(LEDGER)
        problems.append(f"{ledger} is cut off or damaged: no confusion, norms and queries of single images")
    folder = gallery_folder(path)
    shown = None
    if folder.is_dir():
        try:
            shown = read_gallery(folder)
        except InputError as error:
            problems.append(f"no pictures: {error}")
        if shown is not None and record.settings_sha256 != shown.settings_sha256:
            shown = None
            problems.append(f"the pictures in {folder} are another evaluation's")
        problems += [] if shown is None else shown.problems
        lost = [] if shown is None else list(_missing(folder, shown))
        problems += [f"{len(lost)} of the pictures in {folder} are missing, the first is {lost[0]}"] if lost else []
    return Evaluated(path, record, shown, tuple(problems))


def _without_ledger(path: Path, error: InputError) -> EvaluationRecord:
    """The record alone, if that is whole; what was wrong with both if not."""
    values = _json(path)
    if values.get("format") != FORMAT:
        raise error
    try:
        return parse(EvaluationRecord, values, str(path))
    except InputError:
        raise error from None


def _missing(folder: Path, shown: GalleryIndex) -> Iterator[str]:
    for gallery_image in (*shown.misclassified, *shown.robust):
        for picture in gallery_image.pictures:
            if not (folder / gallery_image.file(picture)).is_file():
                yield gallery_image.file(picture)


def _so_far(path: Path) -> str:
    """What an evaluation found that was not finished."""
    ledger = path.with_suffix(LEDGER)
    try:
        rows = read_rows(ledger, cut_off=True) if ledger.is_file() else []
    except (InputError, ValueError) as error:
        return f"{path.stem} has no record, and its ledger cannot be read: {first_line(error)}"
    clean = [r for r in rows if r.attack == CLEAN]
    right = sum(r.clean_prediction == r.label for r in clean)
    fallen = {(r.image) for r in rows if r.attack != CLEAN and fell(r)}
    unfinished = is_unfinished(path)
    lost = "was not finished" if unfinished else "lost its record"
    return (
        f"{path.stem} {lost}: so far {right} of {len(clean)} images were correct and {len(fallen)} of these "
        f"fell; repeat the evaluation{', it goes on from there' if unfinished else ''}"
    )


def _history(path: Path) -> tuple[tuple[EpochMetrics, ...], list[str]]:
    """The epochs in metrics.csv, up to the first line that cannot be read."""
    if not path.is_file():
        return (), [f"{path} is missing: no training curves"]
    history: list[EpochMetrics] = []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for line in csv.DictReader(file.read().replace("\0", "").splitlines()):
            try:
                values: dict[str, Any] = {f.name: _number(line[f.name]) for f in dataclasses.fields(EpochMetrics)}
                whole = None not in (values["gate_open"], values["validation_accuracy"])
            except (KeyError, ValueError, TypeError):
                whole = False
            if not whole:
                return tuple(history), [f"{path} is damaged after {len(history)} epochs"]
            history.append(EpochMetrics(**{**values, "epoch": len(history)}))
    return tuple(history), []


def _number(text: str) -> float | None:
    return float(text) if text else None


def _json(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
