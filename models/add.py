"""Adds a trained network to models/ and to the manifest, with a model card written from its files.

For example `python models/add.py runs/mnist-mini mnist/mini-fpd --description "FPD around a small ResNet"
--record runs/mnist-mini/evaluation/mnist-quick-linf.json`.
A stage of training is a run of its own: the adversarial one is in the folder `adversarial` of the first.

`python models/add.py --refresh` writes all cards, the manifest and the table of README.md again, from the files in
models/.
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
from robustfpd.evaluation.record import LEDGER
from robustfpd.evaluation.robustness import format_eps
from robustfpd.io import readable_folder, replace_folder, write_json, write_text
from robustfpd.models import FPD, Baseline, load, zoo
from robustfpd.models.checkpoint import CONFIG, WEIGHTS
from robustfpd.provenance import weights_sha256
from robustfpd.report.model_card import PACKAGES, TRAINING, model_card, training_description
from robustfpd.report.sources import evaluation_command
from robustfpd.training import RunFolder

HERE = Path(__file__).resolve().parent
CARD = "README.md"
BEGIN, END = "<!-- measured: models/add.py -->", "<!-- end of networks -->"
"""Markers of the table in README.md."""
MAX_LEDGER_BYTES = 200_000
"""A larger ledger is left out; the card's commands make it again."""
MACHINE_PATH = re.compile(r"(?<![\w.:/)])~?(?:/[\w.@+-]+){2,}|\b[A-Za-z]:\\\\?\w")
"""An absolute path, which is useless elsewhere; addresses and relative paths do not match."""


def add(
    run: tyro.conf.Positional[Path],
    name: tyro.conf.Positional[str],
    /,
    description: str,
    record: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction],
    images: str = "",
    folder: Path = HERE,
    manifest: Path = zoo.MANIFEST,
) -> None:
    """Copy a run's best checkpoint with its evaluations, write its card, add it to the manifest.

    Args:
        run: the run's folder, of the stage to add.
        name: its name in the zoo, DATASET/MODEL.
        description: one line.
        record: an evaluation's JSON; repeat the flag for several. `robustfpd models` shows the first.
        images: images that it was trained and evaluated on, where they are not the data set's own parts.
        folder: folder of the trained networks.
        manifest: the manifest to change.

    Raises:
        InputError: weights over 5 MB, an evaluation of other weights or other images, paths of this machine in a
            file to publish, or a run that no command repeats.
    """
    source = RunFolder(run)
    config = _public_config(source.config())
    _check_names(name, description, config, record)
    best = readable_folder(source.best)
    if not best.is_dir():
        raise MissingDataError(f"{run} holds no checkpoints/best; train it first")
    size = (best / WEIGHTS).stat().st_size
    if size > zoo.LARGEST:
        raise InputError(f"{best / WEIGHTS} has {size:,} bytes; models/ takes networks of up to {zoo.LARGEST:,}")
    model = load(source.best)
    records = {path.stem: _checked(EvaluationRecord.load(path), path, model, source) for path in record}
    stages = _stages(source, config)
    with replace_folder(folder / name) as new:
        for file in (WEIGHTS, CONFIG):
            shutil.copyfile(best / file, new / file)
        config.save(new / zoo.SETTINGS)
        write_json(new / TRAINING, {"stages": stages})
        for stem, evaluation in records.items():
            command = {"command": evaluation_command(evaluation, config, name)}  # the run's has a path of this machine
            update = {"model_name": name, "environment": {**evaluation.environment, **command}}
            path = evaluation.model_copy(update=update).save(new / "results" / f"{stem}.json")
            ledger = path.with_suffix(LEDGER)
            if not evaluation.ledger or ledger.stat().st_size >= MAX_LEDGER_BYTES:
                ledger.unlink()
                print(f"left out: the ledger of {stem}, which is empty or over {MAX_LEDGER_BYTES:,} bytes")
        model_card(new, name, description, list(records), images).save(new / CARD)
        _check_paths(new)
    _write_entry(name, description, list(records), images, folder, manifest)
    _write_table(folder, manifest)
    print(f"added {name}: {folder / name}, {size:,} bytes of weights; read its {CARD}, then commit both")


def refresh(folder: Path = HERE, manifest: Path = zoo.MANIFEST) -> None:
    """Write the cards of all networks in the manifest again, and the manifest, from the files in `folder`.

    Records keep their order; new ones come last, and names of files that are gone are dropped.

    Raises:
        InputError: a network without records, a record of other weights, or a path of this machine in a file.
    """
    for name, entry in _read_manifest(manifest).models.items():
        home = folder / name
        stems = [Path(path).stem for path in entry.results]
        stems += sorted(path.stem for path in (home / "results").glob("*.json") if path.stem not in stems)
        stems = [stem for stem in stems if (home / "results" / f"{stem}.json").is_file()]
        expected = weights_sha256(load(home).classifier())
        for path in (home / "results" / f"{stem}.json" for stem in stems):
            if EvaluationRecord.load(path).weights_sha256 != expected:
                raise InputError(f"{path} is not an evaluation of the weights in {home}; evaluate {name} again")
        if not stems:
            raise InputError(f"{home / 'results'} holds no record; evaluate {name} and put the record there")
        model_card(home, name, entry.description, stems, entry.images).save(home / CARD)
        _check_paths(home)
        _write_entry(name, entry.description, stems, entry.images, folder, manifest)
        print(f"refreshed {name}")
    _write_table(folder, manifest)


def table(folder: Path = HERE, manifest: Path = zoo.MANIFEST) -> str:
    """Return the table of README.md: every network with the first record's accuracies at each radius."""
    lines = ["| name | training | suite, images | clean | robust |", "|---|---|---|---|---|"]
    for name, entry in _read_manifest(manifest).models.items():
        record = EvaluationRecord.load(folder / entry.results[0])
        verdict = "" if record.verdict.status == "trusted" else f" ({record.verdict.status})"
        radii = "<br>".join(f"eps {format_eps(worst.eps)}: {worst.robust}" for worst in record.under_attack)
        suite = f"`{record.suite}`, {record.num_images:,}"
        lines.append(f"| `{name}` | {entry.training} | {suite} | {record.clean} | {radii}{verdict} |")
    return "\n".join(lines)


def _write_table(folder: Path, manifest: Path) -> None:
    """Write the table into the README beside the folder of networks, if there is one."""
    readme = folder.parent / "README.md"
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN) if readme.is_file() else ("", "", "")
    _, end, after = rest.partition(END)
    if end:
        write_text(readme, f"{before}{begin}\n\n{table(folder, manifest)}\n\n{end}{after}")


def _public_config(config: RunConfig) -> RunConfig:
    """Return the settings with the default folders; a folder of images keeps its name."""
    root = f"data/{Path(config.data.root).name}" if config.data.dataset == "folder" else "data"
    data = config.data.model_copy(update={"root": root, "cache": None, "download": False})
    return config.model_copy(update={"data": data})


def _check_names(name: str, description: str, config: RunConfig, records: Sequence[Path]) -> None:
    dataset = config.data.dataset
    dataset = config.recipe.split("/")[0] if dataset == "folder" else dataset  # files of a known data set
    if not re.fullmatch(rf"{re.escape(dataset)}/[a-z0-9][a-z0-9-]*", name):
        raise InputError(f"NAME must be {dataset}/ and lower-case letters, digits and dashes, found {name!r}")
    if not description.strip() or "\n" in description:
        raise InputError(f"--description must be one line, found {description!r}")
    stems = [path.stem for path in records]
    unfit = next((stem for stem in stems if stems.count(stem) > 1 or not re.fullmatch(r"[\w-][\w.-]*", stem)), None)
    if unfit is not None or not stems:
        raise InputError(f"--record files must have different names of letters, digits, dots and dashes: {unfit!r}")


def _checked(record: EvaluationRecord, path: Path, model: FPD | Baseline, source: RunFolder) -> EvaluationRecord:
    """Return a record after checking that it is of these weights and of the test images."""
    expected = weights_sha256(model.classifier())
    if record.weights_sha256 != expected:
        raise InputError(
            f"{path} is not about the weights in {source.best}: weights_sha256 {expected} expected, found "
            f"{record.weights_sha256 or 'none'}; run robustfpd evaluate {source.path}"
        )
    if record.model_name.endswith("(validation images)"):
        raise InputError(f"{path} is about validation images, on which settings were chosen; evaluate the test images")
    test = _environment(source).get("data", {}).get("test", {})
    if record.num_images == test.get("images") and record.data_sha256 != test.get("sha256"):
        raise InputError(f"{path} is about other images than the run's test set; evaluate it without --dataset")
    return record


def _stages(source: RunFolder, config: RunConfig) -> list[dict[str, Any]]:
    """Return the costs of the run's stage and of the stage before it."""
    stages = []
    if config.stage == "adversarial" and config.adversarial.start == "best":
        first = RunFolder(source.path.resolve().parent)
        before = _public_config(first.config())
        for part in ("data", "model", "training", "seed"):
            if getattr(before, part) != getattr(config, part):
                raise InputError(f"{source.path} does not continue the run in {first.path}: {part} differs")
        stages = _stages(first, before)
    if not source.metrics_file.is_file():
        raise MissingDataError(f"{source.path} holds no metrics.csv; was it trained?")
    with source.metrics_file.open(newline="") as file:
        seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
    title = "training" if config.stage == "two-phase" and config.model.defence == "none" else config.stage
    env = _environment(source)
    kept = {key: env.get(key) for key in ("python", "device", "threads", "git_revision")}
    packages = {package: env.get("packages", {}).get(package) for package in PACKAGES}
    cost = {"stage": title, "epochs": len(seconds), "seconds": sum(seconds)}
    return [*stages, {**cost, "environment": {**kept, "packages": packages}}]


def _environment(source: RunFolder) -> Mapping[str, Any]:
    path = source.path / "environment.json"
    values = json.loads(path.read_text()) if path.is_file() else {}
    assert isinstance(values, dict)
    return values


def _check_paths(home: Path) -> None:
    """Refuse files with a path of this machine."""
    for file in sorted(path for path in home.rglob("*") if path.suffix in (".json", ".yaml", ".md")):
        match = MACHINE_PATH.search(file.read_text(encoding="utf-8"))
        if match:
            raise InputError(
                f"{file.relative_to(home)} would hold a path of this machine, {match[0]!r}; remove it from its source"
            )


def _write_entry(name: str, description: str, stems: Sequence[str], images: str, folder: Path, manifest: Path) -> None:
    """Write the network's entry of the manifest, with the hash of every file in its folder."""
    config = RunFolder(folder / name).config()
    files = [
        zoo.ZooFile(path=path.relative_to(folder).as_posix(), sha256=zoo.digest(path), size=path.stat().st_size)
        for path in sorted((folder / name).rglob("*"))
        if path.is_file()
    ]
    entry = zoo.ZooModel(
        description=description, recipe=config.recipe, dataset=config.data.dataset, defence=config.model.defence,
        training=training_description(config), images=images, files=tuple(files),
        results=tuple(f"{name}/results/{stem}.json" for stem in stems),
    )  # fmt: skip
    models = {**_read_manifest(manifest).models, name: entry}
    write_json(manifest, zoo.Manifest(models=dict(sorted(models.items()))).model_dump(mode="json"))


def _read_manifest(path: Path) -> zoo.Manifest:
    values = json.loads(path.read_text()) if path.is_file() else {"models": {}}
    return parse(zoo.Manifest, values, str(path))


if __name__ == "__main__":
    try:
        if sys.argv[1:] == ["--refresh"]:
            refresh()
        else:
            tyro.cli(add, description=__doc__)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
