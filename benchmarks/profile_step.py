"""Time of a training step by kind of operation: an FPD's two-phase step and its baseline's step.

    python benchmarks/profile_step.py resnet18 --size 64 --batch 32 --precision fp32

Prints one line of JSON: milliseconds of each kind, measured by torch's profiler, which adds to them.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from robustfpd.config import ModelConfig, OptimizerConfig, TaskConfig, TrainingConfig
from robustfpd.models import FPD, build
from robustfpd.training.optim import OptimizerUpdate, make_optimizer, parameter_groups
from robustfpd.training.steps import baseline_step, two_phase_step

KINDS: dict[str, tuple[str, ...]] = {
    "optimizer": ("Optimizer.", "foreach_norm", "linalg_vector_norm", "foreach_mul"),
    "convolutions": ("convolution", "conv2d"),
    "batch norm": ("batch_norm",),
    "denoising's products": ("bmm",),
    "activations": ("elu", "Elu", "threshold", "clamp", "exp_", "sub_", "maximum"),
}
"""Parts of the names of operations; the rest is sums, copies and the like."""


def kind_of(event: Any) -> str:
    """Return the kind of an operation; one called by the optimizer is the optimizer's."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for kind, parts in KINDS.items():
        matched = names if kind == "optimizer" else names[:1]
        if any(part in name for name in matched for part in parts):
            return kind
    return "the rest"


def profiled(step: Callable[[], None], repeats: int) -> dict[str, float]:
    """Return milliseconds of a step by kind."""
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            step()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        times[kind_of(event)] += event.self_cpu_time_total / 1000 / repeats
    return dict(times)


def main() -> None:
    """Profile both steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--front", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    task = TaskConfig(num_classes=10, in_channels=given.channels, image_size=(given.size, given.size))
    config = ModelConfig(backbone=given.backbone, front_stages=given.front)
    training = TrainingConfig(threshold=1e30)
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(given.batch, given.channels, given.size, given.size, generator=draws)
    labels = torch.randint(0, 10, (given.batch,), generator=draws)
    report: dict[str, Any] = {"backbone": given.backbone, "size": given.size, "precision": given.precision}
    for name, settings in (("fpd", config), ("baseline", config.baseline())):
        model = build(task, settings, seed=0).train()
        update = OptimizerUpdate(make_optimizer(parameter_groups(model), OptimizerConfig()), clip_grad_norm=10)

        def once(model: Any = model, update: OptimizerUpdate = update) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=given.precision == "bf16"):
                if isinstance(model, FPD):
                    two_phase_step(model, images, images, labels, update, training, generator=draws)
                else:
                    baseline_step(model, images, labels, update, training)

        report[name] = {kind: round(ms, 1) for kind, ms in sorted(profiled(once, given.repeats).items())}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
