"""`robustfpd demo`: the main job on real images, in minutes and offline."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustfpd.cli.output import Output
from robustfpd.errors import InputError

if TYPE_CHECKING:
    from robustfpd.evaluation import EvaluationRecord

FOLDERS = ("fpd", "baseline", "baseline-no-noise")
MARKER = "demo.json"
"""By this file the folder of an earlier demo is known."""


def demo(
    out: Path = Path("runs/demo"), seed: int = 0, epochs: int | None = None, json: bool = False, quiet: bool = False
) -> None:  # fmt: skip
    """Train an FPD and its undefended baselines on 1,797 real digits, attack them all, write a report.

    The baselines are the same backbone without the defence, trained for the same number of optimiser steps:
    one with the same noise, one without. White-box FGSM and PGD-40, on the FPD's pre-tanh logits as well.

    For example `robustfpd demo`, or `robustfpd demo --seed 1 --out runs/demo-1`.

    Args:
        out: folder for the three runs and the report; an earlier demo's are replaced.
        seed: seed of every random draw.
        epochs: passes over the training images; default the recipe's (digits/mini).
        json: tell the comparison as JSON.
        quiet: tell nothing but errors and warnings.
    """
    from robustfpd.config import recipe

    overrides = [f"seed={seed}"] + ([f"training.epochs={epochs}"] if epochs is not None else [])
    fpd = recipe("digits/mini", overrides)  # before torch is imported: a wrong number is told at once
    _check(out)
    import torch

    from robustfpd import data, evaluation, training
    from robustfpd.cli.common import program
    from robustfpd.cli.display import evaluation_display, training_display
    from robustfpd.report.page import comparison_sentence, report_on
    from robustfpd.report.sources import read
    from robustfpd.report.tables import comparison_table
    from robustfpd.report.write import write_report

    baseline = fpd.baseline()
    noiseless = baseline.model_copy(update={"training": baseline.training.model_copy(update={"noise": 0.0})})
    runs = {"FPD": fpd, "undefended baseline, same noise": baseline, "undefended baseline, no noise": noiseless}

    torch.set_num_threads(1)  # 8×8 images are too small to share: threads would wait for each other
    output = Output(json=json, quiet=quiet)
    splits = data.load(fpd.data)
    _claim(out, seed)
    test, records = splits.test.floats(), []
    folders = [out / name for name in FOLDERS]
    for (name, config), folder in zip(runs.items(), folders, strict=True):
        with training_display(output.console, name) as observer:
            # 8×8 images gain nothing from bfloat16, and the README tells what fp32 gives.
            result = training.train(config, folder, device="cpu", precision="fp32", observer=observer)
        with evaluation_display(output.console, name) as watcher:
            record = evaluation.evaluate(
                result.model.classifier(), test, suite="first-look", eps=config.evaluation.eps, norm="linf", seed=seed,
                every_attack=True, model_name=name, class_names=splits.info.class_names, out_dir=folder / "evaluation",
                record_name="first-look-linf", observer=watcher,
            )  # fmt: skip
        records.append(record)
    title = "What a Feature Pyramid Decoder buys on digits"
    page = write_report(out / "report.html", report_on([read(folder) for folder in folders], title=title))[0]
    output.say(comparison_table(records))
    output.explain(comparison_sentence(records) or "")
    output.say(f"report: {page}", "try next:")
    output.say(*(f"  {step}" for step in _next_steps(program())))
    networks = [{"folder": str(f), **_summary(r)} for f, r in zip(folders, records, strict=True)]
    output.result({"seed": seed, "report": str(page), "networks": networks})


def _summary(record: EvaluationRecord) -> dict[str, Any]:
    """What was found of one network, for machines; accuracies are fractions."""
    worst = [{"eps": w.eps, "accuracy": w.robust.value} for w in record.worst_case]
    return {"model_name": record.model_name, "clean": record.clean_accuracy, "worst_case": worst}


def _check(out: Path) -> None:
    """Refuse a folder that holds something else than an earlier demo."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MARKER).is_file())):
        raise InputError(f"{out} holds something other than a demo; give another folder with --out")


def _claim(out: Path, seed: int) -> None:
    """Empty the folder of an earlier demo."""
    from robustfpd.io import write_json

    for earlier in FOLDERS:
        shutil.rmtree(out / earlier, ignore_errors=True)
    write_json(out / MARKER, {"seed": seed})


def _next_steps(program: str) -> list[str]:
    return [
        f"{program} train digits/mini training.noise=0.1   # another noise level",
        f"{program} evaluate runs/digits-mini --norm l2 --eps 0.5 1   # another norm",
        f"{program} train mnist/mini --data-root data --download   # a larger data set",
        f"{program} recipes   # what else there is",
    ]
