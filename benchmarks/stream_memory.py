"""Host memory while CALTECH-256 at its full size streams from the cache: one shuffled epoch of its batches.

Makes a cache file of 30,607 images of 3×256×256 bytes (6 GB) in a temporary folder and reads it through the code that
training uses, cropped by augmentation to 224. Prints the peak of what is resident, its anonymous part and its part of
mapped files, and seconds; last, one line of JSON. The page cache, which the kernel takes back when others need memory,
is not resident.

    python benchmarks/stream_memory.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from robustfpd.data.batches import batches
from robustfpd.data.decode_cache import kept
from robustfpd.data.image_set import ImageSet
from robustfpd.rng import generator

SHAPE = (30_607, 3, 256, 256)
SEEN = (224, 224)
LIMIT = 2000


def pictures(count: int) -> Iterator[np.ndarray]:
    """Pictures that differ, made cheaply."""
    picture = np.random.default_rng(0).integers(0, 256, SHAPE[1:], dtype=np.uint8)
    for number in range(count):
        picture[0, 0, :4] = np.frombuffer(number.to_bytes(4, "big"), dtype=np.uint8)
        yield picture


def resident() -> dict[str, float]:
    """What is resident now, in MB: anonymous memory, pages of mapped files, all."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {name: int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "VmRSS")}


def main() -> None:
    """Make the file, stream it, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=SHAPE[0])
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--folder", help="where the file goes for a while; default the system's temporary folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        shape = (arguments.images, *SHAPE[1:])
        start = time.perf_counter()
        found = kept(Path(folder), "synthetic", {}, shape, lambda: pictures(arguments.images), lambda done, total: None)
        made = time.perf_counter() - start
        data = ImageSet(found.images, torch.arange(arguments.images), size=SEEN)
        before, peaks, seconds = resident(), resident(), []
        for epoch in range(arguments.epochs):
            start, checked = time.perf_counter(), 0
            for images, numbers in batches(
                data, arguments.batch_size, torch.device("cpu"), generator(0, "order", epoch)
            ):
                first = (images[:, 0, 0, :4] * 255).round().long() @ torch.tensor([1 << 24, 1 << 16, 1 << 8, 1])
                assert torch.equal(first, numbers), "a picture is not the one asked for"
                checked += len(numbers)
                now = resident()
                peaks = {name: max(peak, now[name]) for name, peak in peaks.items()}
            seconds.append(time.perf_counter() - start)
    for name, peak in peaks.items():
        print(f"{name:8} peak {peak:8.0f} MB, before {before[name]:6.0f} MB")
    print(f"made in {made:.1f} s, streamed in {', '.join(f'{s:.1f} s' for s in seconds)}")
    most = max(peaks.values())
    share = most / LIMIT
    value = {"median": share, "low": share, "high": share, "count": 1}
    what = f"{arguments.images:,} images of {SHAPE[2]}×{SHAPE[3]}, an epoch: peak resident memory, of {LIMIT} MB"
    told = {"images": arguments.images, "before_mb": before, "peak_mb": peaks, "epoch_s": seconds}
    print(json.dumps({**told, "measures": [{"what": what, "value": value, "unit": "%", "bar": {"at_most": 1}}]}))


if __name__ == "__main__":
    main()
