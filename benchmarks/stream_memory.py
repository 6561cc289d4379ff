"""Host memory while a data set of CALTECH-256's size streams from the cache: one shuffled epoch of its batches.

Makes a cache file of 30,607 images of 3×256×256 bytes (6 GB) in a temporary folder and reads it through the code that
training uses, cropped by augmentation to 224. Prints peak resident memory, its anonymous part and its part of mapped
files, and seconds. The page cache, which the kernel frees on demand, is not resident.

    python benchmarks/stream_memory.py
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from robustfpd.data.decode_cache import cached_images
from robustfpd.data.image_set import ImageSet, batches
from robustfpd.rng import generator

SHAPE = (30_607, 3, 256, 256)
SEEN = (224, 224)
LIMIT = 2000


def distinct_images(count: int) -> Iterator[np.ndarray]:
    """Yield distinct images, made cheaply."""
    image = np.random.default_rng(0).integers(0, 256, SHAPE[1:], dtype=np.uint8)
    for number in range(count):
        image[0, 0, :4] = np.frombuffer(number.to_bytes(4, "big"), dtype=np.uint8)
        yield image


def resident() -> dict[str, float]:
    """Return resident memory in MB: anonymous memory, pages of mapped files, all."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "VmRSS")}


def main() -> None:
    """Make the file, stream it, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=SHAPE[0])
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--folder", help="folder for the temporary file; default the system's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        shape = (arguments.images, *SHAPE[1:])
        start = time.perf_counter()
        images = partial(distinct_images, arguments.images)
        cached = cached_images(Path(folder), "synthetic", {}, shape, images, lambda done, total: None)
        made = time.perf_counter() - start
        data = ImageSet(cached.images, torch.arange(arguments.images), size=SEEN)
        before, peaks, seconds = resident(), resident(), []
        for epoch in range(arguments.epochs):
            start, checked = time.perf_counter(), 0
            for x, numbers in batches(data, arguments.batch_size, torch.device("cpu"), generator(0, "order", epoch)):
                first = (x[:, 0, 0, :4] * 255).round().long() @ torch.tensor([1 << 24, 1 << 16, 1 << 8, 1])
                assert torch.equal(first, numbers), "the batch holds another image than requested"
                checked += len(numbers)
                now = resident()
                peaks = {name: max(peak, now[name]) for name, peak in peaks.items()}
            seconds.append(time.perf_counter() - start)
    for name, peak in peaks.items():
        print(f"{name:8} peak {peak:8.0f} MB, before {before[name]:6.0f} MB")
    print(f"made in {made:.1f} s, streamed in {', '.join(f'{s:.1f} s' for s in seconds)}")
    most = max(peaks.values())
    print(f"bar: at most {LIMIT} MB, {'reached' if most <= LIMIT else f'missed by {most / LIMIT - 1:.0%}'}")


if __name__ == "__main__":
    main()
