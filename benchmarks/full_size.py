"""Trains a full-size recipe for two steps on random images of its image size; prints time and peak memory.

    python benchmarks/full_size.py svhn/resnext50
    python benchmarks/full_size.py caltech101/resnet101 --protocol published --shallow --batch 2

Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import resource
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

import robustfpd as rf
from robustfpd import data
from robustfpd.config import RunConfig, recipe
from robustfpd.data import ImageSet, Splits
from robustfpd.training import Observer, Progress

SHALLOW = {"resnet101": "published_resnet_1_1_1_1", "resnet50": "published_resnet_1_1_1_1"}


class _TwoStepsDone(Exception):
    """Ends the training."""


def random_splits(config: RunConfig) -> Splits:
    """Return two batches of random training images of the recipe's size."""
    described = data.info(config.data.dataset)
    size = config.data.stored_size or config.data.image_size
    assert size is not None
    draws = torch.Generator().manual_seed(0)
    count = 2 * config.training.batch_size
    channels = config.data.channels or described.in_channels
    classes = described.num_classes + config.data.background

    def images(n: int) -> ImageSet:
        pixels = torch.randint(0, 256, (n, described.in_channels, *size), dtype=torch.uint8, generator=draws)
        labels = torch.randint(0, classes, (n,), generator=draws)
        return ImageSet(pixels, labels, channels, config.data.image_size)

    task = {"num_classes": classes, "in_channels": channels, "image_size": config.data.image_size}
    return Splits(type(described)(**{**vars(described), **task}), images(count), images(2), images(2))


def two_steps(name: str, protocol: str, batch: int | None, shallow: bool, gate: bool) -> dict[str, object]:
    """Train for two batches; return losses, time and memory. `gate=False` opens the gate, so that both phases run."""
    settings = ([] if gate else ["training.threshold=1e12"]) + ([f"training.batch_size={batch}"] if batch else [])
    config = recipe(name, settings, protocol=protocol)
    if shallow:
        shallower = SHALLOW.get(config.model.backbone) or re.sub(r"(_\d+){4}$", "_1_1_1_1", config.model.backbone)
        model = config.model.model_copy(update={"backbone": shallower})
        config = config.model_copy(update={"model": model})
    splits, steps = random_splits(config), list[Progress]()

    def on_batch(progress: Progress) -> None:
        steps.append(progress)
        if len(steps) == 2:  # no validation: after two batches, running statistics are too far off
            raise _TwoStepsDone

    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        patch("robustfpd.data.load", return_value=splits),
        contextlib.suppress(_TwoStepsDone),
    ):
        rf.train(config, Path(folder) / "run", device="cpu", observer=Observer(on_batch=on_batch))
    last = steps[1].step.first
    assert last.restoration is not None
    return {
        "recipe": name, "protocol": protocol, "batch": config.training.batch_size, "backbone": config.model.backbone,
        "image_size": config.data.image_size, "ce": float(last.ce), "restoration": float(last.restoration),
        "steps": len(steps), "gates_open": sum(bool(p.step.gate_open) for p in steps),
        "step_seconds": config.training.batch_size / steps[1].images_per_second, "seconds": time.perf_counter() - start,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }  # fmt: skip


def main() -> None:
    """Read the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--protocol", default="corrected")
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--shallow", action="store_true", help="one block a stage")
    parser.add_argument("--open", action="store_true", help="keep the gate open, so that both phases run")
    given = parser.parse_args()
    print(json.dumps(two_steps(given.recipe, given.protocol, given.batch, given.shallow, not given.open)))


if __name__ == "__main__":
    main()
