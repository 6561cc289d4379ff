"""`robustfpd train`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import tyro

from robustfpd.errors import InputError, unknown_name

if TYPE_CHECKING:
    from rich.console import Console

    from robustfpd.config import RunConfig, StageName
    from robustfpd.training import TrainResult


def train(
    recipe: tyro.conf.Positional[str],
    settings: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    stages: str = "two-phase",
    protocol: Literal["corrected", "published"] = "corrected",
    data_root: str | None = None,
    download: bool = False,
    out: Path | None = None,
    seed: int | None = None,
    plain: bool = False,
    resume: bool = False,
    device: str = "auto",
) -> None:
    """Train a recipe's network in two phases, then adversarially if asked, and keep each stage's checkpoints.

    For example `robustfpd train digits/mini`,
    or `robustfpd train mnist/mini training.noise=0.1 --data-root data --download`,
    or `robustfpd train mnist/mini --stages two-phase,adversarial --data-root data`.

    Args:
        recipe: name of a recipe (see `robustfpd recipes`) or a YAML file.
        settings: changes to the recipe, as field=value: training.epochs=3 model.head=spectral.
        stages: two-phase, adversarial, or both with a comma; adversarial alone goes on from the two-phase run in the
            same folder.
        protocol: corrected, or published: what the authors' code does, see docs/protocols.md.
        data_root: folder where torchvision keeps its data sets.
        download: fetch the data set into data-root when it is not there.
        out: the run's folder; default runs/RECIPE. The adversarial stage goes into its folder adversarial.
        seed: seed of every random draw; default the recipe's.
        plain: train the plain twin instead: no defence, same data, noise and number of optimiser steps.
        resume: go on after the last whole epoch of an interrupted run.
        device: auto, cpu, cuda or mps.
    """
    from rich.console import Console

    from robustfpd import config as configuration
    from robustfpd.cli.running import configured, program, torch_device
    from robustfpd.evaluation.suite import suite

    chosen = torch_device(device)
    run = configured(configuration.recipe(recipe, settings, protocol=protocol), data_root, download, seed)
    suite(run.evaluation.suite)  # now, not after hours of training
    run = run.twin() if plain else run
    variant = ("-published" if protocol == "published" else "") + ("-plain" if plain else "")
    folder = out or Path("runs") / (recipe_slug(recipe) + variant)
    planned = _plan(run, _stage_names(stages), folder)
    options = {
        "--stages": stages, "--protocol": protocol, "--out": folder, "--data-root": data_root, "--seed": seed,
        "--device": device,
    }  # fmt: skip
    flags = [word for word, on in (("--plain", plain), ("--download", download)) if on]
    command = [program(), "train", recipe, *settings, *_words(options), *flags]
    console = Console(soft_wrap=True)
    for stage in planned:
        title = f"training {recipe}{' (plain twin)' if plain else ''}, stage {stage.run.stage}, into {stage.folder}"
        console.print(title, highlight=False)
        result = _train(stage, resume, str(chosen), console, command)
        _tell(result, stage.run, console)
    data = f" --data-root {data_root}" if data_root else ""
    console.print(f"next: {program()} evaluate {planned[-1].folder}{data}", highlight=False)


@dataclass(frozen=True)
class _Planned:
    """One stage: its settings, where it goes, and the checkpoint it begins with."""

    run: RunConfig
    folder: Path
    start: Path | None


def _stage_names(text: str) -> list[StageName]:
    from robustfpd.config import StageName

    known = get_args(StageName)
    asked = [name.strip() for name in text.split(",") if name.strip()]
    for name in asked:
        if name not in known:
            raise unknown_name("stage", name, known)
    if not asked or asked != sorted(set(asked), key=known.index):
        raise InputError(f"--stages takes two-phase, adversarial or two-phase,adversarial, found {text!r}")
    return asked  # type: ignore[return-value]


def _plan(run: RunConfig, stages: list[StageName], folder: Path) -> list[_Planned]:
    """The stages with their folders; the adversarial one begins with what lies, or will lie, in the folder above."""
    from robustfpd.models.checkpoint import whole
    from robustfpd.training import RunFolder

    planned = []
    for name in stages:
        stage_run = run.model_copy(update={"stage": name})
        if name == "two-phase":
            planned.append(_Planned(stage_run, folder, None))
            continue
        begins = folder if run.adversarial.start == "best" else None
        if begins is not None and "two-phase" not in stages and not whole(RunFolder(folder).best).is_dir():
            raise InputError(
                f"the adversarial stage begins with the two-phase run in {folder}, which holds no checkpoint; "
                "train both with --stages two-phase,adversarial"
            )
        planned.append(_Planned(stage_run, folder / "adversarial", begins))
    return planned


def _train(stage: _Planned, resume: bool, device: str, console: Console, command: list[str]) -> TrainResult:
    """Train one stage; on Ctrl-C say what is kept and how to go on, and leave with 130."""
    from robustfpd import training
    from robustfpd.cli.display import training_display

    folder = training.RunFolder(stage.folder)
    go_on = resume and (folder.started or stage.run.stage == "two-phase")
    try:
        with training_display(console, stage.run.data.dataset) as observer:
            return training.train(
                stage.run, stage.folder, start=stage.start, resume=go_on, device=device, observer=observer
            )
    except KeyboardInterrupt:
        whole = folder.training_state()
        epochs = len(whole["history"]) if whole else 0
        begun = folder.started or resume or stage.run.stage == "adversarial"
        again = shlex.join([*command, *(["--resume"] if begun else [])])
        count = "1 whole epoch is" if epochs == 1 else f"{epochs} whole epochs are"
        kept = f"{count} kept in {stage.folder}" if epochs else "no epoch was whole yet"
        console.print(f"\ninterrupted; {kept}. Go on with:\n  {again}", highlight=False)
        raise SystemExit(130) from None


def _tell(result: TrainResult, run: RunConfig, console: Console) -> None:
    """One line on how a stage ended."""
    best = result.history[result.best_epoch]
    why = "stopped early" if result.stopped_early else "all epochs done"
    robust = best.validation_robust_accuracy
    under = "" if robust is None else f", {100 * robust:.2f} % under PGD-10 at eps {run.adversarial.eps:.4g}"
    console.print(
        f"{why}; best epoch {result.best_epoch + 1}: validation accuracy {100 * best.validation_accuracy:.2f} %{under}",
        highlight=False,
    )


def recipe_slug(recipe: str) -> str:
    """A recipe's name as part of a folder's name."""
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")


def _words(options: dict[str, Any]) -> list[str]:
    """Flags and values as words; what is not given, or the default, is left out."""
    defaults = {"--stages": "two-phase", "--protocol": "corrected"}
    return [
        word
        for name, value in options.items()
        if value is not None and value != defaults.get(name)
        for word in (name, str(value))
    ]
