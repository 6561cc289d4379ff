"""`robustfpd demo`: the main job on real images, in minutes and offline."""

from __future__ import annotations

import shutil
from pathlib import Path

from robustfpd.errors import InputError

FOLDERS = ("fpd", "twin", "twin-no-noise")


def demo(out: Path = Path("runs/demo"), seed: int = 0, epochs: int | None = None) -> None:
    """Train an FPD and its plain twins on 1,797 real digits, attack them all, write a report.

    The twins are the same backbone without the defence, trained for the same number of optimiser steps:
    one with the same noise, one without. White-box FGSM and PGD-40, on the FPD's pre-tanh logits as well.

    For example `robustfpd demo`, or `robustfpd demo --seed 1 --out runs/demo-1`.

    Args:
        out: folder for the three runs and the report; an earlier demo's are replaced.
        seed: seed of every random draw.
        epochs: passes over the training images; default the recipe's (digits/mini).
    """
    import torch
    from rich.console import Console

    from robustfpd import data, evaluation, training
    from robustfpd.cli.display import evaluation_display, training_display
    from robustfpd.cli.running import program
    from robustfpd.config import recipe
    from robustfpd.models import FPD
    from robustfpd.report.gallery import defence_gallery
    from robustfpd.report.html import Subject, summary, write_report
    from robustfpd.report.tables import comparison_table

    overrides = [f"seed={seed}"] + ([f"training.epochs={epochs}"] if epochs is not None else [])
    fpd = recipe("digits/mini", overrides)
    twin = fpd.twin()
    quiet = twin.model_copy(update={"training": twin.training.model_copy(update={"noise": 0.0})})
    runs = {"FPD": fpd, "plain twin, same noise": twin, "plain twin, no noise": quiet}

    torch.set_num_threads(1)  # 8×8 images are too small to share: threads would wait for each other
    console = Console(soft_wrap=True)
    splits = data.load(fpd.data)
    _claim(out, seed)
    test = splits.test.floats()
    subjects = []
    for index, (name, config) in enumerate(runs.items()):
        folder = out / FOLDERS[index]
        with training_display(console, name) as observer:
            result = training.train(config, folder, device="cpu", observer=observer)
        with evaluation_display(console, name) as watcher:
            record = evaluation.evaluate(
                result.model.classifier(), test, suite="first-look", eps=config.evaluation.eps, norm="linf", seed=seed,
                every_attack=True, subject=name, observer=watcher,
            )  # fmt: skip
        record.save(folder / "evaluation" / "first-look-linf.json")
        subjects.append(Subject(config, result.history, record))
        if isinstance(result.model, FPD):
            defended = result.model

    next_steps = _next_steps(program())
    records = [s.record for s in subjects]
    shown = fpd.evaluation.eps[len(fpd.evaluation.eps) // 2]
    gallery = defence_gallery(defended, splits.test, noise=fpd.training.noise, eps=shown, seed=seed)
    title = "What a Feature Pyramid Decoder buys on digits"
    page = write_report(out / "report.html", title, subjects, gallery, next_steps)
    console.print(comparison_table(records))
    console.print(summary(records), highlight=False)
    console.print(f"report: {page}\ntry next:", highlight=False)
    for step in next_steps:
        console.print(f"  {step}", highlight=False)


def _claim(out: Path, seed: int) -> None:
    """Empty the folder of an earlier demo; refuse one that holds something else."""
    from robustfpd.provenance import write_json

    marker = out / "demo.json"
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not marker.is_file())):
        raise InputError(f"{out} holds something other than a demo; give another folder with --out")
    for earlier in FOLDERS:
        shutil.rmtree(out / earlier, ignore_errors=True)
    write_json(marker, {"seed": seed})


def _next_steps(program: str) -> list[str]:
    return [
        f"{program} train digits/mini training.noise=0.1   # another noise level",
        f"{program} evaluate runs/digits-mini --norm l2 --eps 0.5 1   # another norm",
        f"{program} train mnist/mini --data-root data --download   # a larger data set",
        f"{program} recipes   # what else there is",
    ]
