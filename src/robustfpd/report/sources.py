"""The files of a run as a report reads them: missing or damaged files are listed as problems, the rest is read."""

from __future__ import annotations

import csv
import dataclasses
import json
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
from robustfpd.report.paths import resolve
from robustfpd.training import EpochMetrics, RunFolder

UNFINISHED = ".unfinished.json"


@dataclass(frozen=True)
class StoredEvaluation:
    """One evaluation of a run."""

    path: Path
    record: EvaluationRecord
    gallery: GalleryIndex | None
    """None where there are no pictures."""
    problems: tuple[str, ...] = ()

    @property
    def strength(self) -> tuple[int, int]:
        """Sort key: strong suites first, then many images."""
        rank = STRENGTH.index(self.record.suite) if self.record.suite in STRENGTH else len(STRENGTH)
        return rank, -self.record.num_images


@dataclass(frozen=True)
class Source:
    """A run, or another folder with evaluations."""

    name: str
    home: Path
    """Folder of its report."""
    evaluations: tuple[StoredEvaluation, ...] = ()
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
        return _read(name, target.results, None, [path])
    if target.kind == "run":
        return _read(name, path, RunFolder(path), records)
    if target.kind == "zoo":
        source = _read(name, target.results, None, [*records, *_records(path / "results")])
        settings = path / zoo.SETTINGS
        return dataclasses.replace(source, config=load_run(settings) if settings.is_file() else None)
    if target.kind == "factory":
        return _read(name, target.results, None, records)
    return _read(name, path, None, _records(path) or records)


def _records(folder: Path) -> list[Path]:
    """Return the paths of a folder's records; those of unfinished evaluations do not exist yet."""
    if not folder.is_dir():
        return []
    names = {p.name.removesuffix(UNFINISHED).removesuffix(".json") for p in folder.glob("*.json")}
    names |= {p.name.removesuffix(LEDGER) for p in folder.glob(f"*{LEDGER}")}
    paths = [folder / f"{name}.json" for name in sorted(names)]
    return [p for p in paths if is_unfinished(p) or p.with_suffix(LEDGER).is_file() or "worst_case" in _json(p)]


def _read(name: str, home: Path, run: RunFolder | None, paths: list[Path]) -> Source:
    """Read a source from a run's folder, if there is one, and its records."""
    evaluations, problems = [], []
    for path in paths:
        try:
            evaluations.append(_evaluation(path))
        except InputError as error:
            problems.append(str(error))
    if not paths:
        problems.append(f"{name} was not evaluated: run `robustfpd evaluate {name}`")
    evaluations.sort(key=lambda e: e.strength)
    source = Source(name, home, tuple(evaluations), problems=tuple(problems))
    if run is None:
        return source
    config: RunConfig | None = None
    try:
        config = run.config()
    except InputError as error:
        problems.append(f"settings: {error}")
    history, damaged = _history(run.metrics_file)
    environment = _json(run.path / "environment.json")
    return dataclasses.replace(
        source, config=config, history=history, environment=environment, problems=(*problems, *damaged)
    )


def _evaluation(path: Path) -> StoredEvaluation:
    """Read a record, without its ledger where that is damaged, and its gallery."""
    if is_unfinished(path) or not path.is_file():
        raise InputError(_progress(path))
    ledger, problems = path.with_suffix(LEDGER), []
    without = "no confusion matrix, norms and queries of single images"
    try:
        record = EvaluationRecord.load(path)
        problems += [] if record.ledger else [f"{ledger} is missing: {without}"]
    except InputError:
        values = _json(path)
        if values.get("format") != FORMAT or not ledger.is_file():
            raise
        record = parse(EvaluationRecord, values, str(path))
        problems.append(f"{ledger} is truncated or damaged: {without}")
    folder, gallery = gallery_folder(path), None
    if folder.is_dir():
        try:
            gallery = read_gallery(folder)
        except InputError as error:
            problems.append(f"no pictures: {error}")
    if gallery is not None and record.settings_sha256 != gallery.settings_sha256:
        gallery = None
        problems.append(f"the pictures in {folder} are another evaluation's")
    if gallery is not None:
        files = [i.file(picture) for i in (*gallery.misclassified, *gallery.robust) for picture in i.pictures]
        lost = [file for file in files if not (folder / file).is_file()]
        problems += gallery.problems
        problems += [f"{len(lost)} of the pictures in {folder} are missing, the first is {lost[0]}"] if lost else []
    return StoredEvaluation(path, record, gallery, tuple(problems))


def _progress(path: Path) -> str:
    """Return what the ledger of an unfinished evaluation holds so far."""
    ledger = path.with_suffix(LEDGER)
    try:
        rows = read_rows(ledger, cut_off=True) if ledger.is_file() else []
    except (InputError, ValueError) as error:
        return f"{path.stem} has no record, and its ledger cannot be read: {first_line(error)}"
    clean = [r for r in rows if r.attack == CLEAN]
    correct = sum(r.clean_prediction == r.label for r in clean)
    misclassified = {r.image for r in rows if r.attack != CLEAN and r.outcome == "misclassified"}
    unfinished = is_unfinished(path)
    return (
        f"{path.stem} {'was not finished' if unfinished else 'lost its record'}: so far {correct} of {len(clean)} "
        f"images were correct, and {len(misclassified)} of these were misclassified under attack; repeat the "
        f"evaluation{', which resumes there' if unfinished else ''}"
    )


def _history(path: Path) -> tuple[tuple[EpochMetrics, ...], list[str]]:
    """Return the epochs in metrics.csv up to the first unreadable line, and the problems."""
    if not path.is_file():
        return (), [f"{path} is missing: no training curves"]
    history: list[EpochMetrics] = []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for line in csv.DictReader(file.read().replace("\0", "").splitlines()):
            try:
                values: dict[str, Any] = {f.name: _number(line[f.name]) for f in dataclasses.fields(EpochMetrics)}
                complete = None not in (values["gate_open"], values["validation_accuracy"])
            except (KeyError, ValueError, TypeError):
                complete = False
            if not complete:
                return tuple(history), [f"{path} is damaged after {len(history)} epochs"]
            history.append(EpochMetrics(**{**values, "epoch": len(history)}))
    return tuple(history), []


def _number(text: str) -> float | None:
    return float(text) if text else None


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty where the file does not hold one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
