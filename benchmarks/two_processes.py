"""Speed-up of training on two processes with one core each over one process on one core.

Both train the same batches of synthetic images in the same two-phase steps (gate open). They run in turns, under the
same load; each turn starts new processes, and its time per step is the median after the first steps.

    python benchmarks/two_processes.py --repetitions 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

WORKLOADS = {"resnet_mini@28": ("resnet_mini", 28, 128), "resnet18@64": ("resnet18", 64, 32)}
"""Backbone, image size, images per step."""
WARM_UP = 3
BAR = 1.7
"""Lower bar for the time on one process over that on two."""


def steps(workload: str, count: int) -> list[float]:
    """Return the seconds of each of `count` steps of this process, which trains its part of each batch."""
    from robustfpd.config import AugmentConfig, OptimizerConfig, RunConfig, TrainingConfig
    from robustfpd.data.image_set import ImageSet, batches
    from robustfpd.data.transforms import augment
    from robustfpd.distributed import init_process_group
    from robustfpd.models import enhance
    from robustfpd.rng import generator
    from robustfpd.training.fabric import FabricUpdate, launch
    from robustfpd.training.optim import make_optimizer, parameter_groups
    from robustfpd.training.perturbations import noisy_images
    from robustfpd.training.steps import two_phase_step

    torch.set_num_threads(1)
    backbone, side, size = WORKLOADS[workload]
    group, device = init_process_group("cpu"), torch.device("cpu")
    config = TrainingConfig(threshold=1e9, noise=0.01, second_pass_interval=1)
    fabric = launch(RunConfig(training=config), "cpu", "fp32", Path("unused"))
    raw = enhance(backbone, num_classes=10, in_channels=1, image_size=side, seed=0)
    model = fabric.setup_module(raw.train())
    optimizer = fabric.setup_optimizers(make_optimizer(parameter_groups(raw), OptimizerConfig(lr=1e-4)))
    update = FabricUpdate(fabric, model, optimizer, 10.0)
    draws = generator(0, "benchmark")
    images = torch.randint(0, 256, (size * count, 1, side, side), generator=draws, dtype=torch.uint8)
    data = ImageSet(images, torch.randint(0, 10, (size * count,), generator=draws))
    seconds = []
    start = time.perf_counter()
    for clean, labels in batches(data, size, device, generator(0, "order"), group=group):
        clean = augment(clean, AugmentConfig(rotation=10), draws, group=group)
        noisy = noisy_images(raw, clean, config, draws, group)
        two_phase_step(model, clean, noisy, labels, update, config, generator=draws)
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return seconds


def turn(processes: int, workload: str, count: int) -> float:
    """Return the median seconds of a step on one or two processes."""
    own = ["--worker", workload, "--steps", str(count)]
    starter = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *starter, __file__, *own], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    slowest: list[float] = [max(both) for both in list(zip(*lines, strict=True))[WARM_UP:]]
    return statistics.median(slowest)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--worker", choices=list(WORKLOADS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        # One write per process: two prints may share a line.
        text = json.dumps(steps(arguments.worker, arguments.steps)) + "\n"
        os.write(1, text.encode())
        return
    for workload in arguments.workloads:
        turns = [
            [turn(processes, workload, arguments.steps) for processes in (1, 2)] for _ in range(arguments.repetitions)
        ]
        one, two = (statistics.median(column) for column in zip(*turns, strict=True))
        ratio = statistics.median(alone / shared for alone, shared in turns)
        bar = f"bar {BAR}: {'reached' if ratio >= BAR else f'missed by {1 - ratio / BAR:.0%}'}"
        print(f"{workload:16} {1000 * one:8.1f} ms  {1000 * two:8.1f} ms  {ratio:5.2f}×, {bar}", flush=True)


if __name__ == "__main__":
    main()
