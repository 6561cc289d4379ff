"""`robustfpd models`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from robustfpd.cli.output import Output

if TYPE_CHECKING:
    from pathlib import Path

    from robustfpd.evaluation import EvaluationRecord
    from robustfpd.models.zoo import ZooModel

DEFENCES = {"fpd": "FPD", "none": "no defence"}


def models(json: bool = False, quiet: bool = False) -> None:
    """List the trained networks that come with robustfpd: what `robustfpd evaluate` and `rf.load` take by name.

    Accuracy is in % with its 95 % interval, on clean images and on what robust the attacks at each radius.

    For example `robustfpd models`, or `robustfpd models --json`.

    Args:
        json: tell them as JSON.
        quiet: tell nothing but errors and warnings.
    """
    from rich.table import Table

    from robustfpd.models import zoo
    from robustfpd.models.checkpoint import WEIGHTS

    table = Table("model", "defence", "accuracy in % [95 %]", box=None, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True  # a name is there to be copied
    listed = []
    for name, model in sorted(zoo.manifest().models.items()):
        where, folder = zoo.place(name)
        size, record = model.file(WEIGHTS).size, _record(model, folder)
        how = [DEFENCES[model.defence], *model.training.split(", ")]
        table.add_row(f"{name}\n  {size / 1000:,.0f} kB, {where}", "\n".join(how), f"{_accuracy(record)}\n")
        listed.append({"name": name, **_values(model), "bytes": size, "where": where, **_measured(record)})
    output = Output(json=json, quiet=quiet)
    output.say(table)
    if listed:
        first = listed[0]["name"]
        output.say(f'from Python: rf.load("{first}")', f"to attack it: robustfpd evaluate {first}")
    output.result({"models": listed})


def _values(model: ZooModel) -> dict[str, Any]:
    return model.model_dump(include={"description", "recipe", "dataset", "defence", "training"})


def _record(model: ZooModel, folder: Path | None) -> EvaluationRecord | None:
    """Its evaluation, where the results are at hand and are those that were measured."""
    from robustfpd.evaluation import EvaluationRecord
    from robustfpd.models.zoo import digest

    shown = next((file for file in model.files if model.results[:1] == (file.path,)), None)
    if shown is None or folder is None:
        return None
    path = folder / shown.name
    return EvaluationRecord.load(path) if path.is_file() and digest(path) == shown.sha256 else None


def _accuracy(record: EvaluationRecord | None) -> str:
    """Clean and worst-case accuracy."""
    if record is None:
        return "not at hand"
    rows = [("clean", record.clean), *((f"{record.norm} {w.eps:.3g}", w.robust) for w in record.worst_case)]
    return "\n".join(f"{label:<11} {str(accuracy).replace(' %', '')}" for label, accuracy in rows)


def _measured(record: EvaluationRecord | None) -> dict[str, Any]:
    """The same, for machines."""
    if record is None:
        return {"measured": None}
    worst = record.worst_case[-1]
    return {"measured": {
        "norm": record.norm, "eps": worst.eps, "num_images": record.num_images, "clean": record.clean_accuracy,
        "robust": worst.robust.value,
    }}  # fmt: skip
