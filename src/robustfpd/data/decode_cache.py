"""Decoded images in one file, made once and mapped into memory ever after.

A file holds the pixels of all images, then what it is (JSON), then that text's length and a mark. It is written under
another name and renamed when whole, by one process at a time.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from robustfpd.data.decode import Pixels
from robustfpd.data.described import OnProgress
from robustfpd.data.mapped import mapped
from robustfpd.errors import InputError, first_line
from robustfpd.io import CACHE_VARIABLE, atomic_path, cache_folder

MARK = b"robustfpd/images"
SUFFIX = ".images"
PROCEDURE = 3
"""To be raised when the same files would give other pixels than before."""


@dataclass(frozen=True)
class Kept:
    """Images M×C×H×W uint8, mapped from the cache, and why others of the data set could not be decoded, by place."""

    images: Tensor
    bad: dict[int, str]


def images_folder(chosen: str | Path | None) -> Path:
    """Where decoded images are kept; None takes the cache folder."""
    return (Path(chosen).expanduser() if chosen else cache_folder()) / "images"


def kept(
    folder: Path,
    dataset: str,
    source: Mapping[str, Any],
    shape: tuple[int, int, int, int],
    pictures: Callable[[], Iterator[Pixels | str]],
    on_progress: OnProgress,
) -> Kept:
    """Map the images that `source` stands for, making them first where the cache has none.

    Args:
        folder: of the cache.
        dataset: name of the data set, for the file's name.
        source: all that decides about the pixels; goes into the file's key.
        shape: N C H W of all images, bad ones counted.
        pictures: makes them: C×H×W each, or why one cannot be decoded.
        on_progress: told after each.

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


def _read(path: Path, key: str, shape: tuple[int, int, int, int]) -> Kept | None:
    """Map a file of the cache; None where there is none, or not a whole one."""
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
        return Kept(torch.empty((0, *picture), dtype=torch.uint8), bad)
    return Kept(mapped(path, pixels).reshape(-1, *picture), bad)


def _write(
    path: Path, key: str, shape: tuple[int, int, int, int], pictures: Iterator[Pixels | str], on_progress: OnProgress
) -> None:
    """Write a file of the cache under another name, and rename it when it is whole."""
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
