"""The files of a run as a report reads them, with missing and damaged ones as problems; commands that repeat it."""

from __future__ import annotations

import csv
import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from robustfpd.config import RunConfig, load_run, parse, recipe, recipe_names
from robustfpd.errors import InputError, first_line
from robustfpd.evaluation import EvaluationRecord, is_unfinished
from robustfpd.evaluation.gallery import GalleryIndex, gallery_folder, read_gallery
from robustfpd.evaluation.ledger import CLEAN, read_rows
from robustfpd.evaluation.record import FORMAT, LEDGER
from robustfpd.evaluation.suites import STRENGTH
from robustfpd.models import zoo
from robustfpd.models.import_model import needs_trust
from robustfpd.report.paths import resolve
from robustfpd.training import EpochMetrics

UNFINISHED = ".unfinished.json"
NOT_SETTINGS = ("data.root", "data.download", "data.cache", "evaluation", "stage", "seed", "recipe", "protocol")
"""Fields that are flags, or that do not change the training."""
MULTIPLIED = ("epochs", "early_stop_patience", "schedule.patience")
"""Fields that `RunConfig.baseline` multiplies."""
BUNDLED = ("digits",)
"""Data sets that need no folder."""


@dataclass(frozen=True)
class StoredEvaluation:
    """One evaluation of a run."""

    path: Path
    record: EvaluationRecord
    gallery: GalleryIndex | None
    """None where there are no pictures."""
    problems: tuple[str, ...] = ()

    @property
    def strength(self) -> tuple[bool, int, int]:
        """Sort key: complete evaluations first, then strong suites, then many images."""
        rank = STRENGTH.index(self.record.suite) if self.record.suite in STRENGTH else len(STRENGTH)
        return not self.record.complete, rank, -self.record.num_images


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
    records = _records(target.results)
    home, paths = {
        "record": (target.results, [target.path]),
        "run": (target.path, records),
        "zoo": (target.results, [*records, *_records(target.path / "results")]),
        "factory": (target.results, records),
    }.get(target.kind, (target.path, _records(target.path) or records))
    evaluations, problems = [], []
    for path in paths:
        try:
            evaluations.append(_evaluation(path))
        except InputError as error:
            problems.append(str(error))
    if not paths:
        problems.append(f"{target.name} was not evaluated: run `robustfpd evaluate {target.name}`")
    evaluations.sort(key=lambda e: e.strength)
    settings, config = target.path / zoo.SETTINGS, None
    try:
        config = load_run(settings) if settings.is_file() else None
    except InputError as error:
        problems.append(f"settings: {error}")
    history: tuple[EpochMetrics, ...] = ()
    environment: dict[str, Any] = {}
    if target.kind == "run":
        history, damaged = _history(target.path / "metrics.csv")
        problems += damaged
        environment = _json(target.path / "environment.json")
    return Source(target.name, home, tuple(evaluations), config, history, environment, tuple(problems))


def _records(folder: Path) -> list[Path]:
    """Return the paths of a folder's records; those of unfinished evaluations do not exist yet."""
    if not folder.is_dir():
        return []
    names = {p.name.removesuffix(UNFINISHED).removesuffix(".json") for p in folder.glob("*.json")}
    names |= {p.name.removesuffix(LEDGER) for p in folder.glob(f"*{LEDGER}")}
    paths = [folder / f"{name}.json" for name in sorted(names)]
    return [p for p in paths if is_unfinished(p) or p.with_suffix(LEDGER).is_file() or "worst_case" in _json(p)]


def _evaluation(path: Path) -> StoredEvaluation:
    """Read a record, without its ledger where that is damaged, and its gallery."""
    if not path.is_file() or (is_unfinished(path) and _json(path).get("complete", True)):
        raise InputError(_progress(path))
    ledger, problems = path.with_suffix(LEDGER), []
    without = "no confusion matrix, norms and queries of single images"
    try:
        record = EvaluationRecord.load(path)
        problems += [] if record.ledger else [f"{ledger} is missing: {without}"]
        problems += [] if record.complete else [f"{path.stem} is partial: {record.verdict.checks[-1].evidence}"]
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
    fields = dataclasses.fields(EpochMetrics)
    text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
    for line in csv.DictReader(text.splitlines()):
        try:
            names = [f.name for f in fields if f.name in line or f.default is dataclasses.MISSING]
            values: dict[str, Any] = {name: float(line[name]) if line[name] else None for name in names}
            complete = values["validation_accuracy"] is not None
        except (KeyError, ValueError, TypeError):
            complete = False
        if not complete:
            return tuple(history), [f"{path} is damaged after {len(history)} epochs"]
        history.append(EpochMetrics(**{**values, "epoch": len(history)}))
    return tuple(history), []


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty where the file does not hold one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def training_command(config: RunConfig, out: str) -> str:
    """Return the `robustfpd train` that repeats a run and the stages before it, in the folder `out`.

    Raises:
        InputError: the recipe is not a packaged one, or no overrides of it give these settings.
    """
    if config.recipe not in recipe_names():
        raise InputError(f"recipe {config.recipe!r} is not a packaged one, so no command repeats this run")
    base = recipe(config.recipe, protocol=config.protocol)
    choices = [False, True] if config.model.defence == "none" and base.model.defence != "none" else [False]
    # --baseline also equals the number of optimizer steps, model.defence=none does not.
    found = [(_overrides(config, base, choice), choice) for choice in choices]
    overrides, baseline = min(found, key=lambda overrides_and_choice: len(overrides_and_choice[0]))
    arguments = ["robustfpd", "train", config.recipe, *overrides]
    if config.stage == "adversarial":
        arguments += ["--stages", "two-phase,adversarial" if config.adversarial.start == "best" else "adversarial"]
    arguments += ["--protocol", config.protocol] if config.protocol != RunConfig().protocol else []
    arguments += ["--baseline"] if baseline else []
    arguments += ["--seed", str(config.seed)] if config.seed != base.seed else []
    if config.data.dataset not in BUNDLED:
        arguments += ["--data-root", _data_root(config), *(["--download"] if config.data.dataset != "folder" else [])]
    return shlex.join([*arguments, "--out", out])


def evaluation_command(record: EvaluationRecord, config: RunConfig, model: str) -> str:
    """Return the `robustfpd evaluate` that repeats the evaluation of `record` on `model`, a run or a zoo name."""
    arguments = ["robustfpd", "evaluate", model, "--suite", record.suite, "--norm", record.norm, "--eps"]
    arguments += [*(_eps(worst.eps) for worst in record.worst_case), "--num-images", str(record.num_images)]
    arguments += ["--every-attack"] if record.every_attack else []
    arguments += ["--trust-code"] if needs_trust(config.model.backbone) else []
    arguments += ["--seed", str(record.seed)] if record.seed != config.seed else []
    arguments += ["--data-root", _data_root(config)] if config.data.dataset not in BUNDLED else []
    return shlex.join(arguments)


def _data_root(config: RunConfig) -> str:
    """Return `data`, or the folder of images in it; the folder on this machine is useless elsewhere."""
    name = Path(config.data.root).name
    return f"data/{name}" if config.data.dataset == "folder" and name not in ("", "data") else "data"


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _overrides(config: RunConfig, base: RunConfig, baseline: bool) -> list[str]:
    """Return the `field=value` overrides that lead from the recipe to these settings."""
    wanted, given = _training_settings(config), _training_settings(base)
    if baseline:
        given |= {f"model.{k}": v for k, v in flatten(base.model.baseline().model_dump(mode="json")).items()}
        for stage, times in config.steps_per_batch.items():
            for name in (f"{stage}.{field}" for field in MULTIPLIED):
                wanted[name] = wanted[name] and round(wanted[name] / times)
    changed = {name: value for name, value in wanted.items() if value != given[name]}
    overrides = [f"{name}={_yaml_value(value)}" for name, value in changed.items()]
    made = recipe(config.recipe, overrides, protocol=config.protocol)
    made_settings = _training_settings(made.baseline() if baseline else made)
    for name, value in _training_settings(config).items():
        if made_settings[name] != value:
            raise InputError(
                f"no overrides of recipe {config.recipe} give this run: {name} is {value!r}, "
                f"{shlex.join(overrides)!r} gives {made_settings[name]!r}"
            )
    return overrides


def _training_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings by dotted name, without those that do not change the training."""
    flat = flatten(config.model_dump(mode="json"))
    return {name: v for name, v in flat.items() if name not in NOT_SETTINGS and name.split(".")[0] not in NOT_SETTINGS}


def _yaml_value(value: Any) -> str:
    """Return a value as YAML reads it back."""
    return value if isinstance(value, str) and yaml.safe_load(value) == value else json.dumps(value)


def _eps(eps: float) -> str:
    levels = round(eps * 255)
    return f"{levels}/255" if levels / 255 == eps and len(repr(eps)) > 6 else repr(eps)
