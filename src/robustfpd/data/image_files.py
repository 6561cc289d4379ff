"""Image files that somebody named, as a network takes them: by path, folder or pattern."""

from __future__ import annotations

import glob
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from robustfpd.data.decode import Picture, _cores, picture
from robustfpd.data.inventory import EXTENSIONS
from robustfpd.errors import InputError

SHOWN = (*EXTENSIONS, ".gif")
"""Names of files in a folder that count as images; a file that is named itself may be called anything."""
LARGEST_FILE = 2**30
"""Bytes that one image file may have."""
AT_ONCE = 2**30
"""Bytes that pictures may take together while they are decoded; a larger one is decoded alone."""
GREY = (19595, 38470, 7471)
"""ITU-R 601 luma in 1/65536, as Pillow computes it."""


@dataclass(frozen=True)
class Named:
    """A file to look at, or why there is none."""

    path: Path
    problem: str = ""


def named(given: Sequence[str | Path]) -> list[Named]:
    """The files that paths, folders (with all folders below) and patterns stand for, each once, in order.

    What stands for nothing comes back with its problem.
    """
    found: dict[str, Named] = {}
    for word in given:
        for one in _of(str(word)):
            found.setdefault(str(one.path), one)
    return list(found.values())


def read(files: Sequence[Path], size: tuple[int, int], channels: int) -> Iterator[Picture | str]:
    """Decode files in parallel, in order: uint8 pixels channels×H×W, or why there are none."""
    memory = _Memory(AT_ONCE)

    def one(path: Path) -> Picture | str:
        with memory.holding(_needs(path)):
            return _read(path, size, channels)

    with ThreadPoolExecutor(_cores()) as pool:
        yield from pool.map(one, files)


class _Memory:
    """Lets threads wait until what they are about to hold fits; what never fits is let in alone."""

    def __init__(self, total: int) -> None:
        self.total, self.held = total, 0
        self.changed = threading.Condition()

    @contextmanager
    def holding(self, amount: int) -> Iterator[None]:
        """Hold so many bytes inside the block."""
        with self.changed:
            self.changed.wait_for(lambda: self.held == 0 or self.held + amount <= self.total)
            self.held += amount
        try:
            yield
        finally:
            with self.changed:
                self.held -= amount
                self.changed.notify_all()


def _needs(path: Path) -> int:
    """Bytes that decoding a file takes at most, about: itself, and four for each pixel that its head tells of."""
    with suppress(Exception):  # what is wrong with it, decoding tells
        if path.is_file():  # a pipe would be waited for
            with Image.open(path) as file:
                return path.stat().st_size + 4 * math.prod(file.size)
    return 0


def _of(word: str) -> list[Named]:
    path = Path(word).expanduser()
    try:
        if path.is_dir():
            files = sorted(_below(path))
            return [Named(f) for f in files] or [Named(path, f"no images in this folder ({', '.join(SHOWN)})")]
        if path.exists():
            return [Named(path)]
        if glob.has_magic(word):
            found = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
            files = [f for m in map(Path, sorted(found)) for f in (sorted(_below(m)) if m.is_dir() else [m])]
            return [Named(file) for file in files] or [Named(path, "no file matches this pattern")]
    except OSError as error:  # a folder that may not be read, a name that is too long
        return [Named(path, f"cannot be read: {error.strerror}")]
    return [Named(path, "no such file or folder")]


def _below(folder: Path) -> Iterator[Path]:
    """Image files in a folder and in all folders below, hidden ones apart."""

    def failed(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=failed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place) / f for f in files if not f.startswith(".") and f.lower().endswith(SHOWN))


def _read(path: Path, size: tuple[int, int], channels: int) -> Picture | str:
    try:
        if not path.is_file():  # a pipe would be waited for
            return "not a regular file"
        if path.stat().st_size > LARGEST_FILE:
            return "too large to decode: more than 1 GB"
        found = picture(path, size)
    except InputError as error:
        return str(error).removeprefix(f"{path} ")
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except MemoryError:
        return "too large to decode: not enough memory"
    if isinstance(found, str) or channels == 3:
        return found
    grey = (np.tensordot(GREY, found.pixels.astype(np.int64), axes=1) + 0x8000) >> 16
    return Picture(grey.astype(np.uint8)[None], found.notes)
