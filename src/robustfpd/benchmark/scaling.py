"""Cost of an evaluation by its number of images, and what an import takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from robustfpd.benchmark.attacks import NAMES, Victim
from robustfpd.benchmark.machine import synchroniser
from robustfpd.benchmark.result import Bar, Entry, Measure, Workload
from robustfpd.benchmark.scale import Scale
from robustfpd.benchmark.timing import Contender, Pace, interleave, spread
from robustfpd.evaluation import evaluate

TIMES = 4
LINEAR = Bar(at_least=3.8, at_most=4.2)
IMPORT_BAR = 0.3
IMPORT = "import time; begun = time.perf_counter(); import robustfpd; print(time.perf_counter() - begun)"


def scaling_workloads(scale: Scale, pace: Pace, target: Victim) -> Iterator[Workload]:
    """An evaluation of images, and of the same images four times over; imports."""
    yield linear(scale, pace, target)
    yield imports(pace)


def linear(scale: Scale, pace: Pace, target: Victim) -> Workload:
    """Repeated images need the same work each, so that only their number differs."""
    few, many = f"{scale.scaling_images} images", f"{TIMES * scale.scaling_images} images"
    work = target.work(scale.scaling_images, 1, "linf")

    def run(times: int) -> Callable[[], Any]:
        rows = torch.arange(len(work.images)).repeat(times)
        images, labels = work.images[rows], work.labels[rows]
        return lambda: evaluate(work.classifier, (images, labels), suite=scale.scaling_suite, eps=work.eps)

    contenders = [Contender(few, run(1)), Contender(many, run(TIMES))]
    timing = interleave(contenders, pace, synchronise=synchroniser(work.images.device), warm_ups=0)
    entries = [
        Entry(
            name=name, seconds=timing.spread(name), ratio=timing.ratio(name, few),
            accuracy=timing.returned[name].robust_accuracy,
            forward=timing.returned[name].forward_passes / (len(work.images) * (1 if name == few else TIMES)),
        )
        for name in (few, many)
    ]  # fmt: skip
    measure = Measure(what=f"{TIMES}N images / N images", value=timing.ratio(many, few), bar=LINEAR)
    return Workload(
        group=f"evaluate, suite {scale.scaling_suite}, {NAMES['linf']}, eps {work.eps:g}: {target.name}", reference=few,
        entries=tuple(entries), measures=(measure,),
    )  # fmt: skip


def imports(pace: Pace) -> Workload:
    """`import robustfpd` in new interpreters, after one that fills the caches."""

    def once() -> float:
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        return float(done.stdout)

    once()
    seconds = spread([once() for _ in range(pace.rounds)])
    measure = Measure(what="import robustfpd", value=seconds, unit="s", bar=Bar(at_most=IMPORT_BAR))
    return Workload(group="import", measures=(measure,))
