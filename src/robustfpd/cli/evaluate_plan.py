"""`robustfpd evaluate --dry-run`: which attacks would run, and what they would cost at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from robustfpd.cli.display import duration
from robustfpd.cli.forecast import pace
from robustfpd.cli.output import Output

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from robustfpd.attacks.cost import Passes
    from robustfpd.cli.targets import Subject
    from robustfpd.config import DataConfig, EvaluationConfig, TaskConfig
    from robustfpd.evaluation.suites import AttackSpec


@dataclass(frozen=True)
class _Step:
    """One attack, on all radii."""

    planned: AttackSpec
    each: Passes
    """Of one image at one radius, at most."""
    radii: int
    """How many radii it runs at: one that looks for the smallest perturbation runs once."""


def tell_plan(
    output: Output, found: Subject, data_config: DataConfig, plan: EvaluationConfig, split: str,
    surrogates: Sequence[str], device: torch.device,
) -> None:  # fmt: skip
    """Tell the attacks in their order, their passes at most, and how long these would take; nothing is written."""
    from robustfpd import data
    from robustfpd.attacks.cost import Passes
    from robustfpd.cli.evaluate import record_name

    counts = data.count(data_config)
    there = counts.test if split == "test" else counts.validation
    images = min(plan.num_images, there)
    task = found.task or counts.info.task
    classifier = found.classifier()
    speed = pace(classifier, task, device, training=False)
    steps = _steps(classifier, task, plan, surrogates, device)
    total = Passes(1, 0) * images  # the images as they are
    for step in steps:
        total += step.each * step.radii * images
    seconds = speed.seconds(total)
    path = found.results / f"{record_name(data_config, plan, split)}.json"
    output.say(
        f"{found.name}: {images:,} of {there:,} {split} images of {counts.info.name}, {task}",
        f"suite {plan.suite}, {plan.norm}, eps {' '.join(f'{e:.4g}' for e in plan.eps)}",
        _table(steps),
        f"cost  at most {total.forward:,} images forward, {total.backward:,} backward, and the checks' own",
        f"time  at most about {duration(seconds)}, an estimate; images that fall are not",
        "      attacked again, so most evaluations take far less",
        f"      timed now on {device}: {speed}",
        f"into  {path}",
        "      where an evaluation is there, it goes on or is read",
        "dry run: nothing was attacked or written",
    )
    output.result({
        "subject": found.name, "suite": plan.suite, "norm": plan.norm, "eps": list(plan.eps), "split": split,
        "num_images": images, "dataset": counts.info.name, "device": str(device), "path": str(path),
        "attacks": [_values(step) for step in steps], "forward_passes": total.forward,
        "backward_passes": total.backward, "estimated_seconds": round(seconds, 1), "bound": "upper",
    })  # fmt: skip


def _steps(
    classifier: torch.nn.Module, task: TaskConfig, plan: EvaluationConfig, surrogates: Sequence[str],
    device: torch.device,
) -> list[_Step]:  # fmt: skip
    """The attacks of the suite on this classifier; that it is not random is taken for granted."""
    import torch

    from robustfpd import attacks
    from robustfpd.attacks.adaptive import LOGITS, PRE_SQUASH, adaptive_views
    from robustfpd.attacks.cost import Passes, Victim, most
    from robustfpd.evaluation.suites import SuiteContext
    from robustfpd.evaluation.suites import plan as planned_attacks
    from robustfpd.models.mode import evaluating

    images = torch.rand(4, task.in_channels, *task.image_size, device=device)
    with evaluating(classifier):
        # In normalised space attacks see the logits only.
        views = adaptive_views(classifier, images) if plan.space == "pixels" else {LOGITS: None}
    target = SuiteContext(plan.norm, tuple(views), tuple(surrogates))
    victim = Victim(plan.norm, task.num_classes, images[0].numel())
    looks = Passes(1 + (PRE_SQUASH in views), 0)  # at what it found
    return [
        _Step(p, most(p.attack, victim, p.options) + looks, 1 if attacks.get(p.attack).minimal else len(plan.eps))
        for p in planned_attacks(plan.suite, target)
    ]


def _table(steps: Sequence[_Step]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        "attack", "options", "radii", "forward", "backward", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
        caption="forward, backward: passes of one image at one radius, at most", caption_justify="left",
    )  # fmt: skip
    table.columns[0].no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for step in steps:
        label = step.planned.label
        options = {k: v for k, v in step.planned.options.items() if k != "early_stop" and str(v) not in label}
        told = " ".join(f"{name}={value}" for name, value in options.items())
        table.add_row(label, told, str(step.radii), f"{step.each.forward:,}", f"{step.each.backward:,}")
    return table


def _values(step: _Step) -> dict[str, Any]:
    planned = step.planned
    return {
        "label": planned.label, "attack": planned.attack, "view": planned.view, "options": dict(planned.options),
        "screened": planned.screened, "radii": step.radii, "forward_passes_per_image": step.each.forward,
        "backward_passes_per_image": step.each.backward,
    }  # fmt: skip
