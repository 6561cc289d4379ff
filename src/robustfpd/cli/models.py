"""`robustfpd models`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from robustfpd.models.shipped import ShippedModel

DEFENCES = {"fpd": "FPD", "none": "no defence"}


def models() -> None:
    """List the trained networks that come with robustfpd: what `robustfpd evaluate` and `rf.load` take by name.

    Accuracy is in % with its 95 % interval; the second is what withstood the attacks at the largest radius measured.

    Example: robustfpd models
    """
    from rich.console import Console
    from rich.table import Table

    from robustfpd.models import shipped
    from robustfpd.models.checkpoint import WEIGHTS

    table = Table("model", "defence", "accuracy in % [95 %]", box=None, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True  # a name is there to be copied
    known = shipped.manifest().models
    for name, model in sorted(known.items()):
        where, folder = shipped.place(name)
        size = model.file(WEIGHTS).size / 1000
        how = [DEFENCES[model.defence], *model.training.split(", ")]
        table.add_row(f"{name}\n  {size:,.0f} kB, {where}", "\n".join(how), f"{_accuracy(model, folder)}\n")
    console = Console()
    console.print(table, highlight=False)
    first = next(iter(sorted(known)), None)
    if first is not None:
        console.print(f'from Python: rf.load("{first}")\nto attack it: robustfpd evaluate {first}', highlight=False)


def _accuracy(model: ShippedModel, folder: Path | None) -> str:
    """Clean and worst-case accuracy, where the results are at hand and are those that were measured."""
    from robustfpd.evaluation import EvaluationRecord
    from robustfpd.models.shipped import digest

    shown = next((file for file in model.files if model.results[:1] == (file.path,)), None)
    if shown is None or folder is None:
        return "not at hand"
    path = folder / shown.name
    if not path.is_file() or digest(path) != shown.sha256:
        return "not at hand"
    record = EvaluationRecord.load(path)
    worst = record.worst_case[-1]
    rows = (("clean", record.clean), (f"{record.norm} {worst.eps:.3g}", worst.robust))
    return "\n".join(f"{label:<11} {str(accuracy).replace(' %', '')}" for label, accuracy in rows)
