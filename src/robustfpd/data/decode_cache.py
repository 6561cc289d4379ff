"""Cache of decoded images: one file per data set, decoded once and memory-mapped afterwards.

A file holds the pixels of all images, a JSON footer, the footer's length and a magic number. One process at a time
writes it, atomically.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from filelock import FileLock
from torch import Tensor

from robustfpd.data.image_files import Pixels
from robustfpd.errors import InputError, first_line
from robustfpd.io import CACHE_VARIABLE, atomic_path, cache_folder

MAGIC = b"robustfpd/images"
SUFFIX = ".images"
PROCEDURE = 3
"""Version of the decoding; increase it when the same files decode to other pixels."""


@dataclass(frozen=True)
class CachedImages:
    """Memory-mapped images M×C×H×W uint8, and the errors of files that cannot be decoded, by index."""

    images: Tensor
    bad: dict[int, str]


def images_folder(chosen: str | Path | None) -> Path:
    """Return the folder of decoded images; None takes the cache folder."""
    return (Path(chosen).expanduser() if chosen else cache_folder()) / "images"


def cached_images(
    folder: Path, dataset: str, source: Mapping[str, Any], shape: tuple[int, int, int, int],
    pictures: Callable[[], Iterator[Pixels | str]], on_progress: OnProgress,
) -> CachedImages:  # fmt: skip
    """Return the images that `source` identifies; decode and cache them first if necessary.

    Args:
        folder: folder of the cache.
        dataset: name of the data set, a part of the file's name.
        source: the values that determine the pixels; part of the cache key.
        shape: N C H W of all images, including bad ones.
        pictures: yields each decoded image C×H×W, or the error of a bad file.
        on_progress: called after each image.

    Raises:
        InputError: the folder cannot be written.
    """
    facts = {"procedure": PROCEDURE, "dataset": dataset, "shape": shape, **source}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = folder / f"{dataset}-{key[:24]}{SUFFIX}"
    cached = _read(path, key, shape)
    if cached is not None:
        return cached
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if _read(path, key, shape) is None:  # another process may have written it
                _write(path, key, shape, pictures(), on_progress)
    except OSError as error:
        raise InputError(
            f"decoded images of {dataset} ({math.prod(shape) / 1e6:,.0f} MB) cannot be kept in {folder} "
            f"({error.strerror or first_line(error)}); give another folder with data.cache=FOLDER or {CACHE_VARIABLE}"
        ) from None
    cached = _read(path, key, shape)
    assert cached is not None, path
    return cached


def _read(path: Path, key: str, shape: tuple[int, int, int, int]) -> CachedImages | None:
    """Map a file of the cache; None if it is missing or incomplete."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            tail = 8 + len(MAGIC)
            file.seek(max(0, size - tail))
            end = file.read(tail)
            length = int.from_bytes(end[:8], "big")
            if end[8:] != MAGIC or length > size - tail:
                return None
            file.seek(size - tail - length)
            facts = json.loads(file.read(length))
        bad = {int(index): error for index, error in facts["bad"].items()}
        total, *picture = shape
        pixels = (total - len(bad)) * math.prod(picture)
        if facts["key"] != key or size != pixels + length + tail:
            return None
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None
    if pixels == 0:
        return CachedImages(torch.empty((0, *picture), dtype=torch.uint8), bad)
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), pixels, access=mmap.ACCESS_COPY)  # writes do not reach the file
    images = torch.frombuffer(mapping, dtype=torch.uint8)
    _mappings[images.data_ptr()] = mapping
    return CachedImages(images.reshape(-1, *picture), bad)


def _write(
    path: Path, key: str, shape: tuple[int, int, int, int], pictures: Iterator[Pixels | str], on_progress: OnProgress
) -> None:
    """Write a file of the cache atomically."""
    bad = {}
    with atomic_path(path) as partial, partial.open("wb") as file:
        for index, picture in enumerate(pictures):
            if isinstance(picture, str):
                bad[index] = picture
            else:
                assert picture.shape == shape[1:], picture.shape
                file.write(picture.data)
            on_progress(index + 1, shape[0])
        facts = json.dumps({"key": key, "bad": bad}).encode()
        file.write(facts + len(facts).to_bytes(8, "big") + MAGIC)
        file.flush()
        os.fsync(file.fileno())


_mappings: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
"""Memory maps by the address of the first byte; each lives as long as the tensors that share it."""


def release_pages(data: Tensor) -> None:
    """Drop the resident pages of a mapped file from this process; the kernel's page cache keeps them.

    Otherwise an epoch makes the whole file resident, and a job with a memory limit is killed. Tensors that are not
    memory-mapped are ignored.
    """
    mapping = _mappings.get(data.untyped_storage().data_ptr())
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


OnProgress = Callable[[int, int], None]
"""Called with the number of decoded images and the total."""


@contextmanager
def decoding_progress(title: str, on_progress: OnProgress | None) -> Iterator[OnProgress]:
    """Yield `on_progress`; if it is None, a progress bar on standard error in a terminal."""
    if on_progress is not None or not sys.stderr.isatty():
        yield on_progress or (lambda done, total: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(f"decoding {title}, once")
    begin = time.monotonic()

    def show(done: int, total: int) -> None:
        if time.monotonic() - begin > 2:  # seconds; most data sets take less
            bar.start()  # no effect after the first call
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()
