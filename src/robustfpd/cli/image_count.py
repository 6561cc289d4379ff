"""How many images `robustfpd evaluate` takes where the user gives no number."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustfpd.config import EvaluationConfig

MINUTES = 8.0
"""Attacks of the suite `quick` on the chosen number of images take at most about this time with the checks."""
LIMIT_MINUTES = 9.0
"""Then the command ends, also if it takes longer than estimated."""
LEAST_MINUTES = 3.0
FEWEST = 16
CHECK_PASSES = {"quick": 2500, "first-look": 600}
"""Gradients that the checks of a suite need, typically. Only these suites are fitted into the time."""


@dataclass(frozen=True)
class ImageCount:
    """Number of images and time limit of an evaluation."""

    num_images: int
    max_minutes: float | None
    reason: str = ""
    """Why these are not the recipe's; empty if they are."""


def affordable(options: Mapping[str, Any], plan: EvaluationConfig, path: Path, started: float) -> ImageCount:
    """Return the images of the plan; on a CPU as many photographs as the suite attacks in about eight minutes.

    The number of images of an earlier evaluation in `path` is kept if it is close, so that repeating a command
    resumes it although the speed is never measured twice the same.

    Args:
        options: arguments of `evaluation.evaluate`.
        plan: settings of the evaluation.
        path: the record of an earlier evaluation of this name, if there is one.
        started: when the command started, by `time.perf_counter()`.
    """
    from robustfpd.evaluation.estimate import Speed, planned_attacks
    from robustfpd.evaluation.inputs import CPU_BATCH_SIZE, auto_batch_size, block_size, device_of
    from robustfpd.evaluation.record import LEDGER

    classifier, images = options["classifier"], options["data"][0]
    wanted, radii = min(plan.num_images, len(images)), sum(eps > 0 for eps in plan.eps)
    device = device_of(classifier, images)
    batch_size = auto_batch_size(images, device, block_size(wanted, None))
    if (
        device.type != "cpu"
        or batch_size >= CPU_BATCH_SIZE
        or plan.suite not in CHECK_PASSES
        or wanted <= FEWEST
        or radii == 0
    ):
        return ImageCount(wanted, None)
    speed = Speed.measure(classifier, images[: max(batch_size, 2)], batch_size)
    specs = planned_attacks(
        classifier, images, plan.suite, plan.norm, tuple(options["surrogates"]), randomised=False
    )  # fmt: skip
    gradient = speed.of_image(batch_size)
    per_image = gradient * sum(spec.iterations for spec in specs) * radii
    fitting = int((60 * MINUTES - CHECK_PASSES[plan.suite] * gradient) / per_image)
    count = _kept(path.with_suffix(LEDGER), min(max(fitting, FEWEST), wanted))
    if count == wanted:
        return ImageCount(wanted, None)
    limit = options.get("max_minutes") or max(LIMIT_MINUTES - (time.perf_counter() - started) / 60, LEAST_MINUTES)
    return ImageCount(
        count, round(limit, 2),
        f"takes {count} of {wanted:,} images, which {plan.suite} attacks in about {MINUTES:g} minutes at "
        f"{1000 * gradient:.0f} ms per gradient of one image, and ends after {limit:.1f} minutes; --num-images "
        f"{wanted} takes all and narrows the intervals; --max-minutes sets the limit",
    )  # fmt: skip


def _kept(ledger: Path, count: int) -> int:
    """Return the number of images of an earlier evaluation if it is within a factor of two of `count`."""
    from robustfpd.errors import InputError
    from robustfpd.evaluation.ledger import CLEAN, read_rows

    try:
        rows = read_rows(ledger, cut_off=True) if ledger.is_file() else []
    except (InputError, ValueError):
        rows = []
    earlier = sum(row.attack == CLEAN for row in rows)
    return earlier if count / 2 <= earlier <= 2 * count else count
