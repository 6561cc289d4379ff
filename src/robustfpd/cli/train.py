"""`robustfpd train`."""

from __future__ import annotations

import shlex
from pathlib import Path

import tyro


def train(
    recipe: tyro.conf.Positional[str],
    settings: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    data_root: str | None = None,
    download: bool = False,
    out: Path | None = None,
    seed: int | None = None,
    plain: bool = False,
    resume: bool = False,
    device: str = "auto",
) -> None:
    """Train a recipe's network in two phases and keep its best and last checkpoint.

    For example `robustfpd train digits/mini`,
    or `robustfpd train mnist/mini training.noise=0.1 --data-root data --download`.

    Args:
        recipe: name of a recipe (see `robustfpd recipes`) or a YAML file.
        settings: changes to the recipe, as field=value: training.epochs=3 model.head=spectral.
        data_root: folder where torchvision keeps its data sets.
        download: fetch the data set into data-root when it is not there.
        out: the run's folder; default runs/RECIPE.
        seed: seed of every random draw; default the recipe's.
        plain: train the plain twin instead: no defence, same data, noise and number of optimiser steps.
        resume: go on after the last whole epoch of an interrupted run.
        device: auto, cpu, cuda or mps.
    """
    from rich.console import Console

    from robustfpd import config as configuration
    from robustfpd import training
    from robustfpd.cli.display import training_display
    from robustfpd.cli.running import configured, program, torch_device
    from robustfpd.evaluation.suite import check_suite

    chosen = torch_device(device)
    run = configured(configuration.recipe(recipe, settings), data_root, download, seed)
    check_suite(run.evaluation.suite)  # now, not after hours of training
    run = run.twin() if plain else run
    folder = out or Path("runs") / (recipe_slug(recipe) + ("-plain" if plain else ""))
    command = [program(), *_command(recipe, settings, data_root, folder, seed, plain, device)]
    console = Console(soft_wrap=True)
    console.print(f"training {recipe}{' (plain twin)' if plain else ''} into {folder}", highlight=False)
    try:
        with training_display(console, run.data.dataset) as observer:
            result = training.train(run, folder, resume=resume, device=str(chosen), observer=observer)
    except KeyboardInterrupt:
        interrupted = training.RunFolder(folder)
        whole = interrupted.training_state()
        epochs = len(whole["history"]) if whole else 0
        again = shlex.join([*command, *(["--resume"] if interrupted.started else [])])
        count = "1 whole epoch is" if epochs == 1 else f"{epochs} whole epochs are"
        kept = f"{count} kept in {folder}" if epochs else "no epoch was whole yet"
        console.print(f"\ninterrupted; {kept}. Go on with:\n  {again}", highlight=False)
        raise SystemExit(130) from None
    best = result.history[result.best_epoch]
    why = "stopped early" if result.stopped_early else "all epochs done"
    console.print(
        f"{why}; best epoch {result.best_epoch + 1}: validation accuracy {100 * best.validation_accuracy:.2f} %\n"
        f"next: {program()} evaluate {folder}" + (f" --data-root {data_root}" if data_root else ""),
        highlight=False,
    )


def recipe_slug(recipe: str) -> str:
    """A recipe's name as part of a folder's name."""
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe.replace("/", "-")


def _command(
    recipe: str, settings: tuple[str, ...], data_root: str | None, folder: Path, seed: int | None, plain: bool,
    device: str,
) -> list[str]:  # fmt: skip
    """The words that repeat this training."""
    words = ["train", recipe, *settings, "--out", str(folder), "--device", device]
    words += ["--data-root", data_root] if data_root else []
    words += ["--seed", str(seed)] if seed is not None else []
    return [*words, *(["--plain"] if plain else [])]
