"""`robustfpd train`."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from robustfpd.cli.common import DeviceFlag, Output, check_choice
from robustfpd.distributed import LaunchEnvironment, init_process_group, shared_errors, sigterm_as_interrupt
from robustfpd.errors import InputError

if TYPE_CHECKING:
    import torch

    from robustfpd.config import Precision, RunConfig, StageName
    from robustfpd.data import Counts
    from robustfpd.models import FPD, Baseline
    from robustfpd.training import TrainResult


def train(
    recipe: tyro.conf.Positional[str],
    settings: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    stages: str | None = None,
    protocol: Literal["improved", "corrected", "published"] = "improved",
    data_root: str | None = None,
    download: bool = False,
    out: Path | None = None,
    seed: int | None = None,
    baseline: bool = False,
    resume: bool = False,
    device: DeviceFlag = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    dry_run: bool = False,
    output: Output = Output(),  # noqa: B008
) -> None:
    """Train a recipe's network in two phases, optionally adversarially, and save each stage's checkpoints.

    Several processes, started by torchrun or srun with `-m robustfpd train`, share each batch.

    For example `robustfpd train digits/mini`, or `robustfpd train folder/mini --data-root PHOTOS --dry-run`, or
    `robustfpd train mnist/mini training.noise=0.1 --data-root data --download`, or
    `robustfpd train mnist/mini --stages two-phase,adversarial --data-root data`.

    Args:
        recipe: name of a recipe (see `robustfpd recipes`) or a YAML file.
        settings: changes to the recipe: training.epochs=3 model.head=spectral, or a network of your own with
            model.backbone=package.module:factory.
        stages: two-phase, adversarial, or both with a comma; adversarial alone continues the two-phase run in the same
            folder, unless adversarial.start is scratch. Default: the recipe's.
        protocol: improved starts as the network it wraps, corrected follows the paper, published the authors' code;
            see docs/protocols.md.
        data_root: folder of images for the recipes folder/*, else where torchvision keeps its data sets; default data.
        download: download the data set into --data-root if it is not there.
        out: the run's folder; default runs/RECIPE. The adversarial stage is written to its subfolder adversarial.
        seed: seed of every random draw; default the recipe's.
        baseline: train the undefended baseline instead, with the same data, noise and number of optimizer steps.
        resume: continue after the last complete epoch of an interrupted run.
        precision: bf16 uses bfloat16 autocast, with weights and losses in float32; auto is bf16 where the device
            supports it in hardware, else fp32.
        dry_run: print the plan and an estimate of the time, from one timed batch; train and write nothing.
    """
    from robustfpd import config as configuration
    from robustfpd.cli.common import check_settings, program
    from robustfpd.device import check_device_name, resolve_device
    from robustfpd.models.import_model import needs_trust

    group = init_process_group(device)
    with shared_errors():
        run = configuration.recipe(recipe, settings, protocol=protocol)
        data = {"root": data_root or run.data.root, "download": download or run.data.download}
        changes = {"data": run.data.model_copy(update=data), "seed": run.seed if seed is None else seed}
        run = run.model_copy(update=changes)
        run = run.baseline() if baseline else run
        variant = ("" if protocol == "improved" else f"-{protocol}") + ("-baseline" if baseline else "")
        name = Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")
        folder = out or Path("runs") / f"{name}{variant}"
        names = _stage_names(run, stages)
        check_settings(run)
        check_device_name(device)
        plans = _plan_stages(run, names, folder, existing_ok=resume or dry_run)
        output = output if group.is_main else Output(quiet=True)
        chosen = resolve_device(device, group.world_size)
    if dry_run:
        _dry_run(plans, chosen, precision, output)
        return
    command = [program(), "train", recipe, *settings, "--out", str(folder)]
    for flag, value, default in (
        ("--stages", stages, None), ("--protocol", protocol, "improved"), ("--data-root", data_root, None),
        ("--seed", seed, None), ("--device", device, "auto"), ("--precision", precision, "auto"),
    ):  # fmt: skip
        command += [flag, str(value)] if value != default else []
    command += [flag for flag, given in (("--baseline", baseline), ("--download", download)) if given]
    results = []
    for stage in plans:
        title = f"training {recipe}{' (baseline)' if baseline else ''}, stage {stage.run.stage}, into {stage.folder}"
        result = _train(stage, resume, str(chosen), precision, output, command, title)
        output.print(_ending(result, stage.run))
        results.append(_summary(stage, result))
    trusting = " --trust-code" if needs_trust(run.model.backbone) else ""
    output.print(f"next: {program()} evaluate {shlex.quote(str(plans[-1].folder))}{trusting}")
    output.print_result({"recipe": recipe, "seed": run.seed, "stages": results})


@dataclass(frozen=True)
class StagePlan:
    """One stage: its settings, its folder, and the run whose best checkpoint it starts from."""

    run: RunConfig
    folder: Path
    start: Path | None


def _stage_names(run: RunConfig, text: str | None) -> list[StageName]:
    """Return the stages in `text`, or those of the recipe: its own, after two-phase training where it starts there."""
    from robustfpd.config import STAGES

    if text is None:
        both = run.stage == "adversarial" and run.adversarial.start == "best"
        return ["two-phase", "adversarial"] if both else [run.stage]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        check_choice("stage", name, STAGES)
    if not names or names != sorted(set(names), key=STAGES.index):
        raise InputError(f"--stages takes two-phase, adversarial or two-phase,adversarial, found {text!r}")
    return names  # type: ignore[return-value]


def _plan_stages(run: RunConfig, stages: list[StageName], folder: Path, *, existing_ok: bool) -> list[StagePlan]:
    """Return the stages with their folders; the adversarial one starts from the run in `folder`."""
    from robustfpd.io import readable_folder

    plans = []
    for name in stages:
        stage_run = run.model_copy(update={"stage": name})
        if name == "two-phase":
            plans.append(StagePlan(stage_run, folder, None))
            continue
        start = folder if run.adversarial.start == "best" else None
        best = readable_folder(folder / "checkpoints" / "best")
        if start is not None and "two-phase" not in stages and not best.is_dir():
            raise InputError(
                f"the adversarial stage begins with the two-phase run in {folder}, which holds no checkpoint; "
                "train both with --stages two-phase,adversarial"
            )
        plans.append(StagePlan(stage_run, folder / "adversarial", start))
    for stage in () if existing_ok else plans:  # the second stage's folder too, before the first one is trained
        if (stage.folder / "config.yaml").is_file():
            raise InputError(f"{stage.folder} holds a run; continue it with --resume, or choose another with --out")
    return plans


def _train(
    stage: StagePlan, resume: bool, device: str, precision: Precision, output: Output, command: list[str], title: str
) -> TrainResult:
    """Train one stage; on Ctrl-C or SIGTERM print what is kept and how to resume, and exit with 130."""
    from robustfpd import training
    from robustfpd.cli.display import training_display

    folder = training.RunFolder(stage.folder)
    resuming = resume and (folder.started or stage.run.stage == "two-phase")
    try:
        with sigterm_as_interrupt(), training_display(output.console, stage.run.data.dataset, title) as observer:
            return training.train(
                stage.run, stage.folder, start=stage.start, resume=resuming, device=device, precision=precision,
                observer=observer,
            )  # fmt: skip
    except KeyboardInterrupt:
        epochs = len((folder.training_state() or {"history": []})["history"])
        count = "1 complete epoch is" if epochs == 1 else f"{epochs} complete epochs are"
        kept = f"{count} kept in {stage.folder}" if epochs else "no epoch was complete yet"
        launcher = LaunchEnvironment.read().launcher
        under = "" if launcher == "none" else f", under {launcher} as before"
        if folder.started or resume or stage.run.stage == "adversarial":
            command = [*command, "--resume"]
        output.print(f"\ninterrupted; {kept}. Resume with{under}:\n  {shlex.join(command)}")
        raise SystemExit(130) from None


def _dry_run(stages: Sequence[StagePlan], device: torch.device, precision: Precision, output: Output) -> None:
    """Print each stage and an estimate of its time; train and write nothing."""
    from robustfpd import data
    from robustfpd.cli.display import duration
    from robustfpd.device import resolve_precision
    from robustfpd.models import build

    run, arithmetic = stages[0].run, resolve_precision(precision, device)
    counts = data.count(run.data)
    # Pretrained weights would have to be downloaded, and take the same time.
    model = build(counts.info.task, run.model.model_copy(update={"pretrained": False}), seed=run.seed)
    defence = f"FPD, {run.model.head} head" if run.model.defence == "fpd" else "no defence (undefended baseline)"
    output.print(
        f"recipe {run.recipe}, {run.protocol} protocol, seed {run.seed}\n"
        f"  data      {counts.info.name}, {counts.info.task}\n"
        f"            {counts.train:,} to train, {counts.validation:,} to validate, {counts.test:,} to test\n"
        f"  network   {run.model.backbone}, {defence}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million "
        "parameters\n"
    )
    estimates = []
    for stage in stages:
        step, seconds = _stage_seconds(model, stage.run, counts, device, arithmetic)
        output.print(
            f"stage {stage.run.stage}, into {stage.folder}", *_stage_lines(stage),
            f"  time      at most about {duration(seconds)}, {1000 * step:,.1f} ms a batch timed now on {device};",
            "            early stopping and a shut gate take less\n",
        )  # fmt: skip
        estimates.append({
            "stage": stage.run.stage, "folder": str(stage.folder), "start": stage.start and str(stage.start),
            "epochs": stage.run.procedure.epochs, "seconds_per_batch": step, "estimated_seconds": round(seconds, 1),
        })  # fmt: skip
    output.print("dry run: nothing was trained or written")
    output.print_result({
        "recipe": run.recipe, "protocol": run.protocol, "seed": run.seed, "device": str(device),
        "precision": arithmetic, "settings": run.model_dump(mode="json"),
        "images": {"train": counts.train, "validation": counts.validation, "test": counts.test},
        "stages": estimates,
    })  # fmt: skip


def _stage_lines(stage: StagePlan) -> list[str]:
    """Return the settings that decide what a stage does and how long it takes."""
    procedure, settings = stage.run.procedure, stage.run.adversarial
    optimizer = f"{procedure.optimizer.name} {procedure.optimizer.lr:g}, {procedure.schedule.name}"
    lines = [f"  epochs    {procedure.epochs} of batches of {procedure.batch_size}, {optimizer}"]
    if stage.run.stage == "two-phase":
        return [*lines, f"  noise     {_noise(stage.run)}", *_gate(stage.run)]
    steps = f"-{settings.steps}" if settings.attack == "pgd" else ""
    weight = f", beta {settings.beta:g}" if settings.objective in ("trades", "mart") else ""
    extras = [f"{name} {value:g}" for name, value in (("AWP", settings.awp), ("EMA", settings.ema)) if value]
    return [
        *lines,
        f"  objective {', '.join([f'{settings.objective}{weight}', *extras])}",
        f"  start     {'new weights' if stage.start is None else f'the best checkpoint in {stage.start}'}",
        f"  attack    {settings.attack.upper()}{steps}, {settings.norm}, eps {settings.eps:.4g}",
    ]


def _noise(run: RunConfig) -> str:
    """Return the training noise, and for an FPD the noise between the passes."""
    training = run.training
    between = training.back_pass_noise if run.model.defence == "fpd" else 0
    return f"{training.noise:g}{f', {between:g} between the passes' if between else ''}"


def _gate(run: RunConfig) -> list[str]:
    """Return the gate's threshold; nothing for a baseline."""
    if run.model.defence != "fpd":
        return []
    unit = " times a constant image's" if run.training.threshold_unit == "constant_image" else ""
    return [f"  gate      shut above a restoration loss of {run.training.threshold:g}{unit}"]


def _stage_seconds(
    model: FPD | Baseline, run: RunConfig, counts: Counts, device: torch.device, precision: str
) -> tuple[float, float]:
    """Time single batches of random images: return the seconds of a training step, and of the stage at most."""
    import torch

    from robustfpd.data import ImageSet
    from robustfpd.data.image_set import batches_per_epoch
    from robustfpd.device import timed
    from robustfpd.training.batch_cost import batch_kinds, training_batch
    from robustfpd.training.metrics import robust_accuracy, validate

    procedure, settings, task = run.procedure, run.adversarial, counts.info.task
    size = 2 * procedure.batch_size  # validation batches are twice as large
    shape = (size, task.in_channels, *task.image_size)
    images = ImageSet(torch.randint(256, shape, dtype=torch.uint8), torch.randint(task.num_classes, (size,)))
    train_batch = training_batch(model.to(device).train(), run, images, device, precision)
    step, train = 0.0, 0.0
    for epoch, index, share in batch_kinds(run):
        seconds = timed(partial(train_batch, epoch, index), device)
        step, train = max(step, seconds), train + seconds * share * procedure.epochs
    validation = timed(lambda: validate(model, images, size, device), device) * math.ceil(counts.validation / size)
    if run.stage == "adversarial" and settings.select_by == "robust":
        seconds = timed(lambda: robust_accuracy(model, images, settings, size, device, run.seed), device)
        validation += seconds * math.ceil(min(settings.select_images, counts.validation) / size)
    return step, train * batches_per_epoch(counts.train, procedure.batch_size) + validation * procedure.epochs


def _ending(result: TrainResult, run: RunConfig) -> str:
    """Return one line on how a stage ended."""
    best = result.history[result.best_epoch]
    why = "stopped early" if result.stopped_early else "all epochs done"
    if result.overfitted:
        last = result.history[-1]
        assert last.validation_robust_accuracy is not None
        assert last.train_adversarial_accuracy is not None
        why = (
            f"stopped in epoch {len(result.history)} by catastrophic overfitting: accuracy "
            f"{100 * last.train_adversarial_accuracy:.1f} % under the training attack, "
            f"{100 * last.validation_robust_accuracy:.1f} % under PGD-10; use adversarial.attack=pgd, or a smaller "
            "adversarial.step_size"
        )
    line = f"{why}; best epoch {result.best_epoch + 1}: validation accuracy {100 * best.validation_accuracy:.2f} %"
    if best.validation_robust_accuracy is None:
        return line
    return f"{line}, {100 * best.validation_robust_accuracy:.2f} % under PGD-10 at eps {run.adversarial.eps:.4g}"


def _summary(stage: StagePlan, result: TrainResult) -> dict[str, Any]:
    """Return a stage of the JSON result; epochs are counted from 1, accuracies are fractions."""
    best = result.history[result.best_epoch]
    return {
        "stage": stage.run.stage, "folder": str(stage.folder), "epochs": len(result.history),
        "stopped_early": result.stopped_early, "best_epoch": result.best_epoch + 1,
        "validation_accuracy": best.validation_accuracy,
        "validation_robust_accuracy": best.validation_robust_accuracy,
    }  # fmt: skip
