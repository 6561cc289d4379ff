"""`robustfpd doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from robustfpd.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    from robustfpd.cli.targets import Subject
    from robustfpd.config import DataConfig
    from robustfpd.evaluation import Check

FAILED = 3
"""Exit code if a check failed."""
_STYLES = {"failed": "bold red", "suspicious": "yellow", "passed": "green", "skipped": "dim"}


def doctor(
    run: tyro.conf.Positional[Path | None] = None,
    /,
    model: str | None = None,
    trust_code: bool = False,
    dataset: str | None = None,
    data_root: str | None = None,
    image_size: int | None = None,
    num_images: int = 64,
    seed: int = 0,
    device: str = "auto",
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Check in seconds a model and its data for what would mislead an evaluation, and print how to fix it.

    For example `robustfpd doctor digits/mini-fpd`,
    or `robustfpd doctor --model mypackage.nets:make --dataset cifar10 --data-root data`.

    Images: range, normalisation, order of channels. Labels: range and order. Model: modes, logits or probabilities,
    number of classes, randomness, dependence on the batch, gradients, speed. No attack is run. A check that another
    fault would disturb is skipped until that is fixed.

    Exit code 3 if a check failed, 0 if checks are suspicious at most.

    Args:
        run: a run's folder, a network that comes with robustfpd (see `robustfpd models`), or a folder that model.save
            wrote (then --dataset is needed).
        model: any torch.nn.Module instead, as package.module:factory, images in [0, 1] to logits; --dataset is needed.
        trust_code: import and run the module that the run's network is made by (model.backbone=package.module:factory);
            only for runs of your own.
        dataset: test images of this data set instead of the run's.
        data_root: folder where torchvision keeps its data sets, or the `folder` data set itself.
        image_size: pixels a side that --model expects; default the data set's own.
        num_images: number of images; at least 20 to explain a low accuracy.
        seed: seed of the choice of images.
        device: auto, cpu, cuda or mps.
        json: print one JSON object.
        quiet: print nothing; see the exit code.
    """
    if num_images < 1:
        raise InputError(f"--num-images must be at least 1, found {num_images}")
    if image_size is not None and image_size < 1:
        raise InputError(f"--image-size must be at least 1, found {image_size}")
    if model is not None and dataset is None:
        raise InputError(f"say with --dataset which images {model} is for")
    from robustfpd.cli.output import Output
    from robustfpd.cli.targets import subject
    from robustfpd.device import resolve_device

    output = Output(json=json, quiet=quiet)
    target = subject(run, model, trust_code)
    config = _settings(target, dataset, data_root, image_size)
    chosen = resolve_device(device)
    from robustfpd import data
    from robustfpd.evaluation import diagnose

    with output.console.status(f"checking {target.name}"):
        classifier = target.classifier()
        splits = data.load(config)
        images, labels = splits.test.floats(_drawn(len(splits.test), num_images, seed))
        checks = diagnose(
            classifier.to(chosen), (images, labels), num_images=num_images, num_classes=splits.info.num_classes,
            seed=seed,
        )  # fmt: skip
    failed = [check.name for check in checks if check.outcome == "failed"]
    output.result({
        "model": target.name, "dataset": config.dataset, "images": len(images), "failed": len(failed),
        "checks": [check.model_dump() for check in checks],
    })  # fmt: skip
    output.say(_table(checks))
    output.explain(f"{target.name} on {len(images)} images of {config.dataset}: {_summary(checks)}")
    if failed:
        raise SystemExit(FAILED)


def _settings(
    target: Subject, dataset: str | None, data_root: str | None, image_size: int | None
) -> DataConfig:  # fmt: skip
    """The run's images, or those that were asked for, as the model wants them."""
    from robustfpd import data
    from robustfpd.config import DataConfig

    if target.config is None and dataset is None:
        raise InputError(f"{target.name} is no run; say which test images with --dataset")
    if image_size is not None and target.task is not None:
        raise InputError(f"--image-size is for --model; {target.name} was made for {target.task}")
    config = target.config.data if target.config is not None else DataConfig()
    changes: dict[str, object] = {} if data_root is None else {"root": data_root}
    if dataset is not None and dataset != config.dataset:
        changes |= {"dataset": dataset, "stored_size": None}
        if target.task is not None:
            own = data.info(dataset).in_channels
            changes |= {"image_size": target.task.image_size, "channels": max(own, target.task.in_channels)}
            changes["background"] = target.task.num_classes == data.info(dataset).num_classes + 1
    if image_size is not None:
        changes["image_size"] = (image_size, image_size)
    return config.model_copy(update=changes)


def _drawn(total: int, count: int, seed: int) -> Tensor:
    """Which images; only they are read."""
    import torch

    from robustfpd.rng import generator

    return torch.randperm(total, generator=generator(seed, "images"))[:count].sort().values


def _table(checks: Sequence[Check]) -> Table:
    """Return a row per check, with its evidence and below it the fix."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "check", box=None, pad_edge=False, show_edge=False)
    table.add_column("evidence and fix", ratio=1)
    for check in checks:
        evidence = Text(check.evidence, style="dim" if check.outcome == "skipped" else "")
        if check.fix:
            evidence.append(f"\n→ {check.fix}", style="bold")
        table.add_row(Text(check.outcome, style=_STYLES[check.outcome]), Text(check.name), evidence)
    return table


def _summary(checks: Sequence[Check]) -> str:
    names = {o: ", ".join(c.name for c in checks if c.outcome == o) for o in ("failed", "suspicious", "skipped")}
    if names["failed"]:
        return f"fix {names['failed']} before you evaluate"
    if names["suspicious"]:
        return f"no check failed; suspicious: {names['suspicious']}"
    return "no check failed" + (f"; skipped: {names['skipped']}" if names["skipped"] else "")
