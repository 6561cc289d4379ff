"""Enter a trained network into models/ and into the manifest, with a card written from its files.

For example `python models/add.py runs/mnist-mini mnist/mini-fpd --description "FPD around a small ResNet"
--record runs/mnist-mini/evaluation/mnist-quick-linf.json`.
A stage of training is a run of its own: the adversarial one lies in the folder `adversarial` of the first.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from robustfpd.config import RunConfig, parse
from robustfpd.errors import InputError, MissingDataError
from robustfpd.evaluation import EvaluationRecord
from robustfpd.io import readable_folder, replace_folder, write_json
from robustfpd.models import FPD, Baseline, load, zoo
from robustfpd.models.checkpoint import CONFIG, WEIGHTS
from robustfpd.provenance import weights_sha256
from robustfpd.report.model_card import Card, StageCost, training_in_words
from robustfpd.training import RunFolder

HERE = Path(__file__).resolve().parent
LARGEST_LEDGER = 200_000
"""Bytes of a ledger that goes along; larger ones are made again by the card's commands."""
MACHINE_PATH = re.compile(r"(?<![\w.:/)])~?(?:/[\w.@+-]+){2,}|\b[A-Za-z]:\\\\?\w")
"""An absolute path, which would tell about the machine and help nobody; addresses and relative paths do not match."""


def add(
    run: tyro.conf.Positional[Path],
    name: tyro.conf.Positional[str],
    /,
    description: str,
    record: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction],
    folder: Path = HERE,
    manifest: Path = zoo.MANIFEST,
) -> None:
    """Copy a run's best checkpoint with its evaluations, write its card, enter it into the manifest.

    Args:
        run: the run's folder, of the stage that is to be entered.
        name: what it will be loaded by, DATASET/MODEL.
        description: one line on what it is.
        record: an evaluation's JSON; repeat it for several. `robustfpd models` shows the first.
        folder: where trained networks lie.
        manifest: the manifest to enter it into.

    Raises:
        InputError: weights over 5 MB, an evaluation of other weights or other images, paths of this machine in what
            would be published, or a run that no command repeats.
    """
    source = RunFolder(run)
    config = _published(source.config())
    _check_names(name, description, config, record)
    if not readable_folder(source.best).is_dir():
        raise MissingDataError(f"{run} holds no checkpoints/best; train it first")
    weights = readable_folder(source.best) / WEIGHTS
    size = weights.stat().st_size
    if size > zoo.LARGEST:
        raise InputError(f"{weights} has {size:,} bytes; models/ takes networks of up to {zoo.LARGEST:,}")
    model = load(source.best)
    records = {path.stem: _checked(EvaluationRecord.load(path), path, model, source, name) for path in record}
    ledgers = frozenset(stem for stem, found in records.items() if found.ledger and _small_ledger(record, stem))
    card = Card(
        name, description, config, model, size, zoo.digest(weights), _costs(source, config), records, ledgers
    ).markdown()
    _check_paths({"config.yaml": config.model_dump_json(), "README.md": card})
    _check_paths({stem: found.model_dump_json(exclude={"ledger"}) for stem, found in records.items()})
    with replace_folder(folder / name) as new:
        for file in (WEIGHTS, CONFIG):
            shutil.copyfile(readable_folder(source.best) / file, new / file)
        config.save(new / zoo.SETTINGS)
        for stem, found in records.items():
            found.save(new / "results" / f"{stem}.json")
            if stem not in ledgers:
                (new / "results" / f"{stem}.ledger.csv").unlink()
        (new / "README.md").write_text(card)
    _enter(name, description, config, [f"{name}/results/{stem}.json" for stem in records], folder, manifest)
    for stem in sorted(records.keys() - ledgers):
        print(f"left out: the ledger of {stem}, which is empty or over {LARGEST_LEDGER:,} bytes")
    print(f"entered {name}: {folder / name}, {size:,} bytes of weights; look at its README.md, then commit both")


def _published(config: RunConfig) -> RunConfig:
    """The settings with folders as a user has them by default."""
    data = config.data.model_copy(update={"root": "data", "cache": None, "download": False})
    return config.model_copy(update={"data": data})


def _check_names(name: str, description: str, config: RunConfig, records: Sequence[Path]) -> None:
    dataset = config.data.dataset
    if not re.fullmatch(rf"{re.escape(dataset)}/[a-z0-9][a-z0-9-]*", name):
        raise InputError(f"NAME must be {dataset}/ and lower-case letters, digits and dashes, found {name!r}")
    if not description.strip() or "\n" in description:
        raise InputError(f"--description must be one line, found {description!r}")
    stems = [path.stem for path in records]
    unfit = next((stem for stem in stems if stems.count(stem) > 1 or not re.fullmatch(r"[\w-][\w.-]*", stem)), None)
    if unfit is not None or not stems:
        raise InputError(f"--record files must have different names of letters, digits, dots and dashes: {unfit!r}")


def _checked(
    record: EvaluationRecord, path: Path, model: FPD | Baseline, source: RunFolder, name: str
) -> EvaluationRecord:
    """The record under the network's name, once it is known to be about these weights and the test images."""
    expected = weights_sha256(model.classifier())
    if record.weights_sha256 != expected:
        found = record.weights_sha256 or "none"
        raise InputError(
            f"{path} is not about the weights in {source.best}: weights_sha256 {expected} expected, found {found}; "
            f"run robustfpd evaluate {source.path}"
        )
    if record.model_name.endswith("(validation images)"):
        raise InputError(f"{path} is about validation images, on which settings were chosen; evaluate the test images")
    test = _environment(source).get("data", {}).get("test", {})
    if record.num_images == test.get("images") and record.data_sha256 != test.get("sha256"):
        raise InputError(f"{path} is about other images than the run's test set; evaluate it without --dataset")
    return record.model_copy(update={"model_name": name})


def _small_ledger(records: Sequence[Path], stem: str) -> bool:
    """Whether the ledger beside a record is small enough to go along."""
    path = next(p for p in records if p.stem == stem).with_suffix(".ledger.csv")
    return path.stat().st_size < LARGEST_LEDGER


def _costs(source: RunFolder, config: RunConfig) -> list[StageCost]:
    """What training took, the stage before included."""
    costs = []
    if config.stage == "adversarial" and config.adversarial.start == "best":
        first = RunFolder(source.path.resolve().parent)
        before = _published(first.config())
        for part in ("data", "model", "training", "seed"):
            if getattr(before, part) != getattr(config, part):
                raise InputError(f"{source.path} does not go on from the run in {first.path}: {part} differs")
        costs = _costs(first, before)
    if not source.metrics_file.is_file():
        raise MissingDataError(f"{source.path} holds no metrics.csv; was it trained?")
    with source.metrics_file.open(newline="") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    title = "training" if config.stage == "two-phase" and config.model.defence == "none" else config.stage
    return [*costs, StageCost(title, len(seconds), sum(seconds), _environment(source))]


def _environment(source: RunFolder) -> Mapping[str, Any]:
    path = source.path / "environment.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    assert isinstance(values, dict)
    return values


def _check_paths(texts: Mapping[str, str]) -> None:
    for file, text in texts.items():
        found = MACHINE_PATH.search(text)
        if found:
            raise InputError(f"{file} would hold a path of this machine, {found[0]!r}; take it out of its source first")


def _enter(
    name: str, description: str, config: RunConfig, results: Sequence[str], folder: Path, manifest: Path
) -> None:
    """Write the network's entry, with the hash of every file in its folder."""
    files = [
        zoo.ZooFile(
            path=path.relative_to(folder).as_posix(), sha256=zoo.digest(path), size=path.stat().st_size
        )
        for path in sorted((folder / name).rglob("*")) if path.is_file()
    ]  # fmt: skip
    entry = zoo.ZooModel(
        description=description, recipe=config.recipe, dataset=config.data.dataset, defence=config.model.defence,
        training=training_in_words(config), results=tuple(results), files=tuple(files),
    )  # fmt: skip
    values = json.loads(manifest.read_text()) if manifest.is_file() else {"models": {}}
    models = {**parse(zoo.Manifest, values, str(manifest)).models, name: entry}
    write_json(manifest, zoo.Manifest(models=dict(sorted(models.items()))).model_dump(mode="json"))


if __name__ == "__main__":
    try:
        tyro.cli(add, description=__doc__)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
