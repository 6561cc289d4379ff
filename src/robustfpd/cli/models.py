"""`robustfpd models`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from robustfpd.cli.common import Output

if TYPE_CHECKING:
    from pathlib import Path

    from robustfpd.evaluation import EvaluationRecord
    from robustfpd.models.zoo import ZooModel


def models(output: Output = Output()) -> None:  # noqa: B008
    """List the trained networks that come with robustfpd, whose names `robustfpd evaluate` and `rf.load` take.

    Accuracy is in % with its 95 % interval, on clean images and under the attacks at each radius. The last lines answer
    whether the model is robust at the largest radius, and whether the measurement is reliable. The cost is the time of
    all stages of its training, on one core of a CPU unless its card states another machine.

    For example `robustfpd models`, or `robustfpd models --json`.
    """
    from rich.table import Table

    from robustfpd.models import zoo
    from robustfpd.models.checkpoint import WEIGHTS

    table = Table("model", "defence", "accuracy in % [95 %]", box=None, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True  # names can be copied
    listed = []
    for name, model in sorted(zoo.manifest().models.items()):
        where, folder = zoo.place(name)
        size, record, seconds = model.file(WEIGHTS).size, _record(model, folder), _training_seconds(folder)
        cost = "" if seconds is None else f"\n  trained in {seconds / 60:,.0f} min"
        training = ["FPD" if model.defence == "fpd" else "no defence", *model.training.split(", ")]
        table.add_row(f"{name}\n  {size / 1000:,.0f} kB, {where}{cost}", "\n".join(training), f"{_accuracy(record)}\n")
        described = model.model_dump(include={"description", "recipe", "dataset", "defence", "training"})
        measured = {"training_seconds": seconds, "measured": _measured(record)}
        listed.append({"name": name, **described, "bytes": size, "where": where, **measured})
    output.print(table)
    if listed:
        first = listed[0]["name"]
        output.print(f'from Python: rf.load("{first}")', f"to attack it: robustfpd evaluate {first}")
    output.print_result({"models": listed})


def _record(model: ZooModel, folder: Path | None) -> EvaluationRecord | None:
    """Return the evaluation of a network, if its results are here and are those of the manifest."""
    from robustfpd.evaluation import EvaluationRecord
    from robustfpd.models.zoo import digest

    results = next((file for file in model.files if model.results[:1] == (file.path,)), None)
    if results is None or folder is None:
        return None
    path = folder / results.name
    if not path.is_file() or digest(path) != results.sha256:
        return None
    return EvaluationRecord.load(path).model_copy(update={"dataset": model.dataset})  # not in older records


def _training_seconds(folder: Path | None) -> float | None:
    """Return the seconds of all stages of training, if the network's folder is here and holds them."""
    import json

    from robustfpd.report.model_card import TRAINING

    if folder is None or not (folder / TRAINING).is_file():
        return None
    return sum(float(stage["seconds"]) for stage in json.loads((folder / TRAINING).read_text())["stages"])


def _accuracy(record: EvaluationRecord | None) -> str:
    """Return clean and worst-case accuracy and both answers, one line each."""
    if record is None:
        return "not downloaded"
    rows = [("clean", record.clean), *((f"{record.norm} {w.eps:.3g}", w.robust) for w in record.under_attack)]
    lines = [f"{label:<11} {str(accuracy).replace(' %', '')}" for label, accuracy in rows]
    answers = f"{'robust?':<11} {record.robustness.level}", f"{'reliable?':<11} {record.verdict.status}"
    return "\n".join([*lines, *answers])


def _measured(record: EvaluationRecord | None) -> dict[str, Any] | None:
    """Return clean and worst-case accuracy for the JSON result."""
    if record is None:
        return None
    worst = record.worst_case[-1]
    return {
        "norm": record.norm, "eps": worst.eps, "num_images": record.num_images, "clean": record.clean_accuracy,
        "robust": worst.robust.value, "robustness": record.robustness.model_dump(mode="json"),
        "verdict": record.verdict.status,
    }  # fmt: skip
