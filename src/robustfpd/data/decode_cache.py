"""Cache of decoded images: one file per data set, decoded once and memory-mapped afterwards.

A file holds the pixels of all images, then a JSON header, then the header's length and a mark. One process at a time
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

MARK = b"robustfpd/images"
SUFFIX = ".images"
PROCEDURE = 3
"""Raise it when the same files give other pixels than before."""


@dataclass(frozen=True)
class CachedImages:
    """Images M×C×H×W uint8, mapped from the cache, and the errors of files that cannot be decoded, by index."""

    images: Tensor
    bad: dict[int, str]


def images_folder(chosen: str | Path | None) -> Path:
    """Return the folder of decoded images; None takes the cache folder."""
    return (Path(chosen).expanduser() if chosen else cache_folder()) / "images"


def cached_images(
    folder: Path,
    dataset: str,
    source: Mapping[str, Any],
    shape: tuple[int, int, int, int],
    pictures: Callable[[], Iterator[Pixels | str]],
    on_progress: OnProgress,
) -> CachedImages:
    """Return the images that `source` identifies, decoding them first if the cache lacks them.

    Args:
        folder: of the cache.
        dataset: name of the data set, for the file's name.
        source: everything that determines the pixels; part of the cache key.
        shape: N C H W of all images, bad ones counted.
        pictures: decodes them: C×H×W each, or the error of a bad file.
        on_progress: called after each.

    Raises:
        InputError: the folder cannot be written.
    """
    facts = {"procedure": PROCEDURE, "dataset": dataset, "shape": shape, **source}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = folder / f"{dataset}-{key[:24]}{SUFFIX}"
    found = _read(path, key, shape)
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if _read(path, key, shape) is None:  # another process may have been quicker
                _write(path, key, shape, pictures(), on_progress)
    except OSError as error:
        raise InputError(
            f"decoded images of {dataset} ({math.prod(shape) / 1e6:,.0f} MB) cannot be kept in {folder} "
            f"({error.strerror or first_line(error)}); give another folder with data.cache=FOLDER or {CACHE_VARIABLE}"
        ) from None
    found = _read(path, key, shape)
    if found is None:
        raise InputError(f"{path} was changed while it was made; run again, or give another folder with data.cache=")
    return found


def _read(path: Path, key: str, shape: tuple[int, int, int, int]) -> CachedImages | None:
    """Map a file of the cache; None if it is missing or incomplete."""
    try:
        with path.open("rb") as file:
            whole = file.seek(0, os.SEEK_END)
            tail = 8 + len(MARK)
            file.seek(max(0, whole - tail))
            end = file.read(tail)
            length = int.from_bytes(end[:8], "big")
            if end[8:] != MARK or length > whole - tail:
                return None
            file.seek(whole - tail - length)
            facts = json.loads(file.read(length))
        bad = {int(place): reason for place, reason in facts["bad"].items()}
        total, *picture = shape
        pixels = (total - len(bad)) * math.prod(picture)
        if facts["key"] != key or whole != pixels + length + tail:
            return None
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return None
    if pixels == 0:
        return CachedImages(torch.empty((0, *picture), dtype=torch.uint8), bad)
    return CachedImages(map_file(path, pixels).reshape(-1, *picture), bad)


def _write(
    path: Path, key: str, shape: tuple[int, int, int, int], pictures: Iterator[Pixels | str], on_progress: OnProgress
) -> None:
    """Write a file of the cache atomically."""
    bad = {}
    with atomic_path(path) as partial, partial.open("wb") as file:
        for place, picture in enumerate(pictures):
            if isinstance(picture, str):
                bad[place] = picture
            else:
                assert picture.shape == shape[1:], picture.shape
                file.write(picture.data)
            on_progress(place + 1, shape[0])
        facts = json.dumps({"key": key, "bad": bad}).encode()
        file.write(facts + len(facts).to_bytes(8, "big") + MARK)
        file.flush()
        os.fsync(file.fileno())


_mappings: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
"""By the address of the first byte; each lives as long as the tensors that share it."""


def map_file(path: Path, size: int) -> Tensor:
    """Memory-map the first `size` bytes of a file as uint8; writes to the tensor do not reach the file."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    data = torch.frombuffer(mapping, dtype=torch.uint8)
    _mappings[data.data_ptr()] = mapping
    return data


def release_pages(data: Tensor) -> None:
    """Drop the resident pages of a mapped file from this process; the kernel's page cache keeps them.

    Otherwise an epoch makes the whole file resident, and a job with a memory limit is killed. Other tensors are left
    as they are.
    """
    mapping = _mappings.get(data.untyped_storage().data_ptr())
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)


OnProgress = Callable[[int, int], None]
"""Called with the number of decoded images, and of all."""
PROGRESS_DELAY = 2.0
"""Seconds before the bar appears; most data sets take less."""


@contextmanager
def decoding_progress(title: str, on_progress: OnProgress | None) -> Iterator[OnProgress]:
    """Yield `on_progress`, or else a bar on standard error where that is a terminal."""
    if on_progress is not None or not sys.stderr.isatty():
        yield on_progress or (lambda done, total: None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(f"decoding {title}, once")
    begun, shown = time.monotonic(), False

    def show(done: int, total: int) -> None:
        nonlocal shown
        if not shown and time.monotonic() - begun > PROGRESS_DELAY:
            bar.start()
            shown = True
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        bar.stop()
