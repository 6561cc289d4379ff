"""`robustfpd evaluate --dry-run`: the attacks of an evaluation, and an estimate of its time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustfpd.cli.common import Output

if TYPE_CHECKING:
    from rich.table import Table

    from robustfpd.config import EvaluationConfig
    from robustfpd.evaluation.estimate import AttackEstimate, Estimate


def dry_run(output: Output, options: Mapping[str, Any], plan: EvaluationConfig, path: Path, data_name: str) -> None:
    """Attack a few images, and print the attacks and an estimate of the evaluation's time; write nothing.

    Args:
        output: where to print.
        options: arguments of `evaluation.evaluate`.
        plan: settings of the evaluation.
        path: the evaluation's record.
        data_name: name of the images.
    """
    from robustfpd.cli.display import duration
    from robustfpd.evaluation import EvaluationObserver
    from robustfpd.evaluation.estimate import MINUTES, estimate

    available = len(options["data"][0])
    images, name = min(options["num_images"], available), options["model_name"]
    with output.console.status(f"{name}: attacks a few images, for at most about {MINUTES:g} minutes"):
        settings = {k: v for k, v in options.items() if k not in ("classifier", "data", "num_images", "max_minutes")}
        found = estimate(
            options["classifier"], options["data"], num_images=images, observer=EvaluationObserver(), **settings
        )
    bound = [
        f"        not reached: {', '.join(found.not_reached)}",
        "        the time counts these attacks as if every image survived, and leaves these checks out",
    ]
    output.print(
        f"{name}: {images:,} of {available:,} {data_name}",
        f"suite {plan.suite}, {plan.norm}, eps {' '.join(f'{e:.4g}' for e in plan.eps)}",
        _attack_table(found, len(plan.eps)),
        f"time    about {duration(found.seconds)}, {duration(found.check_seconds)} of it for checks and preparation;",
        f"        estimated now from the evaluation of {found.attacked} images, in {duration(found.spent)}",
        *(bound if found.not_reached else []),
        f"passes  about {found.forward_passes:,} images forward, {found.backward_passes:,} backward",
        f"record  {path}",
        "        an existing evaluation is resumed or read",
        f"dry run: {found.attacked} images were attacked, nothing was written",
    )
    output.print_result({
        "model_name": name, "suite": plan.suite, "norm": plan.norm, "eps": list(plan.eps), "num_images": images,
        "data": data_name, "path": str(path),
        "attacks": [
            {
                "label": a.spec.label, "attack": a.spec.attack, "view": a.spec.view, "options": dict(a.spec.options),
                "share": a.spec.share, "iterations_per_image": a.spec.iterations,
                "estimated_images": a.images, "estimated_seconds": round(a.seconds, 1),
            }
            for a in found.attacks
        ],
        "estimated_seconds": round(found.seconds, 1), "estimated_check_seconds": round(found.check_seconds, 1),
        "estimated_forward_passes": found.forward_passes, "estimated_backward_passes": found.backward_passes,
        "attacked": found.attacked, "not_reached": list(found.not_reached),
    })  # fmt: skip


def _attack_table(found: Estimate, radii: int) -> Table:
    """Return the attacks in their order, with their options, the images that they are run on, and their time."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from robustfpd.cli.display import duration

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("attack", no_wrap=True)
    table.add_column("options")
    for heading in ("iterations", "images" if radii == 1 else "images × radii", "time"):
        table.add_column(heading, justify="right")
    for attack in found.attacks:
        count = f"{attack.spec.iterations:,}"
        table.add_row(attack.spec.label, _options(attack), count, f"{attack.images:,}", duration(attack.seconds))
    return table


def _options(attack: AttackEstimate) -> str:
    spec = attack.spec
    options = {k: v for k, v in spec.options.items() if k != "early_stop" and str(v) not in spec.label}
    return " ".join(f"{name}={value}" for name, value in options.items())
