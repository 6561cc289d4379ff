"""Cost of an evaluation by its number of images, and the time of the import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.attacks import NAMES, AttackedNetwork
from benchmarks.results import Bar, ImplementationResult, Measure, Workload
from benchmarks.sizes import BenchmarkSizes
from benchmarks.timing import Implementation, RoundLimits, interleave, quartiles, synchronizer
from robustfpd.evaluation import evaluate

TIMES = 4
LINEAR = Bar(at_least=3.8, at_most=4.2)
IMPORT_BAR = Bar(at_most=0.3)
IMPORT = "import time; start = time.perf_counter(); import robustfpd; print(time.perf_counter() - start)"


def scaling_workloads(sizes: BenchmarkSizes, limits: RoundLimits, network: AttackedNetwork) -> Iterator[Workload]:
    """Yield an evaluation of N and of 4N images, and the import."""
    yield images(sizes, limits, network)
    yield imports(limits)


def images(sizes: BenchmarkSizes, limits: RoundLimits, network: AttackedNetwork) -> Workload:
    """Evaluate N images, and the same images repeated four times, so that only their number differs."""
    few, many = f"{sizes.scaling_images} images", f"{TIMES * sizes.scaling_images} images"
    case = network.case(sizes.scaling_images, 1, "linf")

    def run(times: int) -> Callable[[], Any]:
        x, y = case.images.repeat(times, 1, 1, 1), case.labels.repeat(times)
        return lambda: evaluate(case.classifier, (x, y), suite=sizes.scaling_suite, eps=case.eps)

    implementations = [Implementation(few, run(1)), Implementation(many, run(TIMES))]
    timing = interleave(implementations, limits, synchronize=synchronizer(case.images.device), warm_ups=0)
    entries = tuple(
        ImplementationResult(
            name=name, seconds=timing.quartiles(name), ratio=timing.ratio(name, few),
            accuracy=timing.returned[name].robust_accuracy,
            forward=timing.returned[name].forward_passes / (len(case.images) * times),
        )
        for name, times in ((few, 1), (many, TIMES))
    )  # fmt: skip
    measure = Measure(what=f"{TIMES}N images / N images", value=timing.ratio(many, few), bar=LINEAR)
    group = f"evaluate, suite {sizes.scaling_suite}, {NAMES['linf']}, eps {case.eps:g}: {network.name}"
    return Workload(group=group, reference=few, entries=entries, measures=(measure,))


def imports(limits: RoundLimits) -> Workload:
    """Time `import robustfpd` in new interpreters, after one that fills the file cache."""

    def once() -> float:
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        return float(done.stdout)

    once()
    seconds = quartiles([once() for _ in range(limits.rounds)])
    return Workload(
        group="import", measures=(Measure(what="import robustfpd", value=seconds, unit="s", bar=IMPORT_BAR),)
    )
