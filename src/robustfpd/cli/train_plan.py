"""`robustfpd train --dry-run`: what would be trained, and what it would cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from robustfpd.cli.display import duration
from robustfpd.cli.forecast import Pace, pace
from robustfpd.cli.output import Output

if TYPE_CHECKING:
    import torch

    from robustfpd.attacks.cost import Passes
    from robustfpd.cli.train import StagePlan
    from robustfpd.config import Precision, RunConfig
    from robustfpd.data import Counts


def tell_plan(output: Output, planned: Sequence[StagePlan], device: torch.device, precision: Precision) -> None:
    """Tell each stage, its passes at most, and how long they would take; nothing is written."""
    from robustfpd import data
    from robustfpd.models import build
    from robustfpd.models.precision import chosen
    from robustfpd.training.cost import stage_cost

    run = planned[0].run
    counts = data.count(run.data)
    task = counts.info.task
    # Pretrained weights would have to be fetched, and take no less time than others.
    model = build(task, run.model.model_copy(update={"pretrained": False}), seed=run.seed)
    arithmetic = chosen(precision, device)
    speed = pace(model, task, device, training=True, bf16=arithmetic == "bf16")
    output.say(_subject(run, counts, sum(p.numel() for p in model.parameters())), "")
    told = []
    for stage in planned:
        passes = stage_cost(stage.run, task, counts.train, counts.validation)
        output.say(f"stage {stage.run.stage}, into {stage.folder}", *_lines(stage, passes, speed), "")
        told.append(_values(stage, passes, speed))
    output.say(f"timed now on {device} in {arithmetic}: {speed}", "dry run: nothing was trained or written")
    output.result({
        "recipe": run.recipe, "protocol": run.protocol, "seed": run.seed, "device": str(device),
        "precision": arithmetic, "settings": run.model_dump(mode="json"),
        "images": {"train": counts.train, "validation": counts.validation, "test": counts.test}, "stages": told,
    })  # fmt: skip


def _subject(run: RunConfig, counts: Counts, parameters: int) -> str:
    task, model = counts.info.task, run.model
    defence = f"FPD, {model.head} head" if model.defence == "fpd" else "no defence (undefended baseline)"
    return (
        f"recipe {run.recipe}, {run.protocol} protocol, seed {run.seed}\n"
        f"  data      {counts.info.name}, {task}\n"
        f"            {counts.train:,} to train, {counts.validation:,} to validate, {counts.test:,} to test\n"
        f"  network   {model.backbone}, {defence}, {parameters / 1e6:.2f} million parameters"
    )


def _lines(stage: StagePlan, passes: Passes, speed: Pace) -> list[str]:
    run, procedure = stage.run, stage.run.procedure
    optimizer = procedure.optimizer
    lines = [
        f"  epochs    {procedure.epochs} of batches of {procedure.batch_size}, {optimizer.name} "
        f"{optimizer.lr:g}, {procedure.schedule.name}"
    ]
    if stage.run.stage == "two-phase":
        lines.append(f"  noise     {run.training.noise:g}, gate at {run.training.threshold:g}")
    else:
        settings = run.adversarial
        steps = f"-{settings.steps}" if settings.attack == "pgd" else ""
        begins = "new weights" if stage.start is None else f"the best checkpoint in {stage.start}"
        lines += [
            f"  begins    with {begins}",
            f"  attack    {settings.attack.upper()}{steps}, {settings.norm}, eps {settings.eps:.4g}",
        ]
    return [
        *lines,
        f"  cost      at most {passes.forward:,} images forward, {passes.backward:,} backward",
        f"  time      about {duration(speed.seconds(passes))}, an estimate; early stopping and a shut gate save some",
    ]


def _values(stage: StagePlan, passes: Passes, speed: Pace) -> dict[str, Any]:
    return {
        "stage": stage.run.stage, "folder": str(stage.folder), "start": stage.start and str(stage.start),
        "epochs": stage.run.procedure.epochs, "forward_passes": passes.forward, "backward_passes": passes.backward,
        "estimated_seconds": round(speed.seconds(passes), 1),
    }  # fmt: skip
