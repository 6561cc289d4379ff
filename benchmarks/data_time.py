"""Data time of the first and of a later epoch on CALTECH-101, which shows what the cache of decoded images saves.

Data time is everything before a batch of floats is on the device: in the first epoch listing, decoding and writing the
cache, in every epoch drawing, copying and converting. Augmentation is timed separately. Each repetition has its own
cache folder; the settings run in turns, under the same load.

    python benchmarks/data_time.py --data-root data --repetitions 3
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import NamedTuple

import torch

from robustfpd import data
from robustfpd.config import DataConfig, recipe
from robustfpd.data.image_set import batches
from robustfpd.data.transforms import augment
from robustfpd.rng import generator

RECIPES = ("caltech101/mini", "caltech101/resnet101")


class Times(NamedTuple):
    """Seconds of one repetition."""

    first: float
    later: float
    augmented: float
    """The later epoch with augmentation."""


def measure(settings: DataConfig, batch_size: int) -> Times:
    """Run two epochs of data, and a third with augmentation, from an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        splits = data.load(settings.model_copy(update={"cache": cache}))
        seconds = []
        for epoch, augmented in enumerate((False, False, True)):
            draws = generator(0, "augment", epoch)
            for images, _ in batches(splits.train, batch_size, torch.device("cpu"), generator(0, "order", epoch)):
                if augmented:
                    augment(images, settings.augment, draws, size=splits.train.size)
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    return Times(*seconds)


def main() -> None:
    """Measure and print medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    runs = {name: recipe(name) for name in RECIPES}
    times: dict[str, list[Times]] = {name: [] for name in RECIPES}
    for repetition in range(arguments.repetitions):
        for name, run in runs.items():
            settings = run.data.model_copy(update={"root": arguments.data_root})
            times[name].append(measure(settings, run.training.batch_size))
            print(
                f"repetition {repetition + 1}, {name}: {', '.join(f'{s:.2f} s' for s in times[name][-1])}", flush=True
            )
    print(f"\n{'recipe':24} {'epoch 1':>9} {'later':>9} {'ratio':>6} {'later + augment':>16}")
    for name in RECIPES:
        first, later, augmented = (statistics.median(column) for column in zip(*times[name], strict=True))
        print(f"{name:24} {first:7.2f} s {later:7.2f} s {first / later:6.1f} {augmented:14.2f} s")


if __name__ == "__main__":
    main()
