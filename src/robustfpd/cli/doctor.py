"""`robustfpd doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from robustfpd.cli.common import RUN, DataFlags, DeviceFlag, ModelFlag, Output, TrustFlag
from robustfpd.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from robustfpd.evaluation import Check

_STYLES = {"failed": "bold red", "suspicious": "yellow", "passed": "green", "skipped": "dim"}


def doctor(
    run: Annotated[tyro.conf.Positional[Path | None], RUN] = None,
    /,
    model: ModelFlag = None,
    trust_code: TrustFlag = False,
    images: DataFlags = DataFlags(),  # noqa: B008
    num_images: int = 64,
    seed: int = 0,
    device: DeviceFlag = "auto",
    output: Output = Output(),  # noqa: B008
) -> None:
    """Check a model and its data for problems that would invalidate an evaluation, and print a fix for each.

    For example `robustfpd doctor digits/mini-fpd`,
    or `robustfpd doctor --model mypackage.nets:make --dataset cifar10 --data-root data`.

    Images: range, normalisation, order of channels. Labels: range and order. Model: modes, logits or probabilities,
    number of classes, randomness, dependence on the batch, gradients, speed. No attack is run. A check is skipped
    if it depends on another check that failed.

    Exits with code 3 if a check failed, else with 0, also if checks are suspicious.

    Args:
        num_images: number of images; at least 20 to explain a low accuracy.
        seed: seed of the choice of images.
    """
    if num_images < 1:
        raise InputError(f"--num-images must be at least 1, found {num_images}")
    from robustfpd.cli.common import named_network
    from robustfpd.device import resolve_device

    target = named_network(run, model, trust_code)
    config = images.config(target)
    chosen = resolve_device(device)

    from robustfpd import data
    from robustfpd.evaluation import diagnose
    from robustfpd.evaluation.loaders import draw_images

    with output.console.status(f"checking {target.name}"):
        classifier = target.classifier()
        splits = data.load(config)
        pixels, labels = splits.test.floats(draw_images(len(splits.test), num_images, seed))
        checks = diagnose(
            classifier.to(chosen), (pixels, labels), num_images=num_images, num_classes=splits.info.num_classes,
            seed=seed,
        )  # fmt: skip
    failed = [check.name for check in checks if check.outcome == "failed"]
    output.print_result({
        "model": target.name, "dataset": config.dataset, "images": len(pixels), "failed": len(failed),
        "checks": [check.model_dump() for check in checks],
    })  # fmt: skip
    output.print(_table(checks))
    output.print_wrapped(f"{target.name} on {len(pixels)} images of {config.dataset}: {_summary(checks)}")
    if failed:
        raise SystemExit(3)


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
