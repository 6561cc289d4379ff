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

    from robustfpd.cli.output import Output
    from robustfpd.cli.targets import Subject
    from robustfpd.config import DataConfig
    from robustfpd.evaluation.doctor import Finding

PROBLEM = 3
"""Exit code when something would ruin an evaluation."""
_COLOURS = {"problem": "bold red", "warning": "yellow", "ok": "green", "skipped": "dim"}


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
    """Look in seconds for what would ruin an evaluation, in a model and in its data, and tell how to mend it.

    For example `robustfpd doctor digits/mini-fpd`,
    or `robustfpd doctor --model mypackage.nets:make --dataset cifar10 --data-root data`.

    Images: their range, normalisation, order of channels. Labels: their range and order, against accuracy. Model: its
    modes, logits or probabilities, number of classes, randomness, dependence on the batch, gradients, speed. Where one
    finding would show in another, the other is skipped until the first is mended.

    Ends with 3 when there is a problem, and with 0 when there are warnings at most.

    Args:
        run: a run's folder, a network that comes with robustfpd (see `robustfpd models`), or a folder that model.save
            wrote (then --dataset is needed).
        model: any torch.nn.Module instead, as package.module:factory, images in [0, 1] to logits; --dataset is needed.
        trust_code: import and run the module that the run's network is made by (model.backbone=package.module:factory);
            only for runs of your own.
        dataset: test images of this data set instead of the run's.
        data_root: folder where torchvision keeps its data sets, or the `folder` data set itself.
        image_size: pixels a side that --model wants; default the data set's own.
        num_images: how many images; 20 at least tell whether pixels or labels are other than the model expects.
        seed: seed of the choice of images.
        device: auto, cpu, cuda or mps.
        json: write one JSON object.
        quiet: say nothing; the exit code tells.
    """
    if num_images < 1:
        raise InputError(f"--num-images must be at least 1, found {num_images}")
    if image_size is not None and image_size < 1:
        raise InputError(f"--image-size must be at least 1, found {image_size}")
    if model is not None and dataset is None:
        raise InputError(f"say with --dataset which images {model} is for")
    from robustfpd.cli.common import torch_device
    from robustfpd.cli.output import Output
    from robustfpd.cli.targets import subject

    output = Output(json=json, quiet=quiet)
    found = subject(run, model, trust_code)
    config = _settings(found, dataset, data_root, image_size)
    chosen = torch_device(device)
    from robustfpd import data
    from robustfpd.evaluation.doctor import diagnose

    with output.console.status(f"{found.name}: looking"):
        classifier = found.classifier()
        splits = data.load(config)
        pixels = splits.test.floats(_drawn(len(splits.test), num_images, seed))
        classes = splits.info.num_classes
        findings = diagnose(classifier.to(chosen), pixels, num_images=num_images, num_classes=classes, seed=seed)
    _tell(output, findings, found.name, config.dataset, len(pixels[1]))
    if any(finding.outcome == "problem" for finding in findings):
        raise SystemExit(PROBLEM)


def _tell(output: Output, findings: Sequence[Finding], name: str, dataset: str, images: int) -> None:
    """The findings, for machines and for people."""
    problems = sum(finding.outcome == "problem" for finding in findings)
    output.result({
        "model": name, "dataset": dataset, "images": images, "problems": problems,
        "findings": [finding.model_dump() for finding in findings],
    })  # fmt: skip
    output.say(_table(findings))
    for line in _summary(findings, name, dataset, images):
        output.explain(line)


def _settings(
    found: Subject, dataset: str | None, data_root: str | None, image_size: int | None
) -> DataConfig:  # fmt: skip
    """The run's images, or those that were asked for, as the model wants them."""
    from robustfpd import data
    from robustfpd.config import DataConfig

    if found.config is None and dataset is None:
        raise InputError(f"{found.name} is no run; say which test images with --dataset")
    if image_size is not None and found.task is not None:
        raise InputError(f"--image-size is for --model; {found.name} was made for {found.task}")
    config = found.config.data if found.config is not None else DataConfig()
    changes: dict[str, object] = {} if data_root is None else {"root": data_root}
    if dataset is not None and dataset != config.dataset:
        changes |= {"dataset": dataset, "stored_size": None}
        if found.task is not None:
            own = data.info(dataset).in_channels
            changes |= {"image_size": found.task.image_size, "channels": max(own, found.task.in_channels)}
            changes["background"] = found.task.num_classes == data.info(dataset).num_classes + 1
    if image_size is not None:
        changes["image_size"] = (image_size, image_size)
    return config.model_copy(update=changes)


def _drawn(total: int, count: int, seed: int) -> Tensor:
    """Which images; only they are read."""
    import torch

    from robustfpd.rng import generator

    return torch.randperm(total, generator=generator(seed, "images"))[:count].sort().values


def _table(findings: Sequence[Finding]) -> Table:
    """Every finding with its evidence, and below it what to do."""
    from rich.table import Table
    from rich.text import Text

    table = Table("", "checked", box=None, pad_edge=False, show_edge=False)
    table.add_column("what was seen, and what to do", ratio=1)
    for finding in findings:
        seen = Text(finding.evidence, style="dim" if finding.outcome == "skipped" else "")
        if finding.fix:
            seen.append(f"\n→ {finding.fix}", style="bold")
        table.add_row(Text(finding.outcome, style=_COLOURS[finding.outcome]), Text(finding.name), seen)
    return table


def _summary(findings: Sequence[Finding], name: str, dataset: str, images: int) -> list[str]:
    problems = [finding.name for finding in findings if finding.outcome == "problem"]
    warnings = [finding.name for finding in findings if finding.outcome == "warning"]
    unseen = [finding.name for finding in findings if finding.outcome == "skipped"]
    on = f"{name} on {images} images of {dataset}"
    if problems:
        return [f"{on}: mend {', '.join(problems)} before you evaluate"]
    if warnings:
        return [f"{on}: nothing that would ruin an evaluation; look at {', '.join(warnings)}"]
    if unseen:
        return [f"{on}: nothing seen that would ruin an evaluation; not looked at: {', '.join(unseen)}"]
    return [f"{on}: nothing that would ruin an evaluation"]
