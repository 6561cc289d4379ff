"""Image files: found by path, folder or pattern, and decoded to uint8 pixels of a given size."""

from __future__ import annotations

import glob
import io
import math
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from robustfpd.data.transforms import margin
from robustfpd.errors import InputError, first_line

Pixels = npt.NDArray[np.uint8]

AHEAD = 256
"""Files decoded before the first of them must be taken; bounds the memory."""


LARGEST = 90_000_000
"""Pixels that a picture may have once it covers its size; Pillow itself refuses files of twice as many."""
ORIENTATION = 0x0112
"""The EXIF tag in which cameras note how the picture is to be turned."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_QUARTERS = tuple(_TURNS[value] for value in (5, 6, 7, 8))
"""Turns that make the width the height."""


@dataclass(frozen=True)
class Picture:
    """A decoded image."""

    pixels: Pixels
    """3×H×W."""
    notes: tuple[str, ...]
    """Changes other than resizing and cropping, in a few words each."""


def decoded(paths: Sequence[Path], size: tuple[int, int]) -> Iterator[Pixels | str]:
    """Decode files in parallel and yield the results of `decode` in order."""
    with ThreadPoolExecutor(_cores()) as pool:
        for start in range(0, len(paths), AHEAD):
            yield from pool.map(lambda path: decode(path, size), paths[start : start + AHEAD])


def decode(path: Path, size: tuple[int, int]) -> Pixels | str:
    """Return the pixels of `picture`, 3×H×W uint8; a string with the error for a bad file."""
    found = picture(path, size)
    return found if isinstance(found, str) else found.pixels


def picture(path: Path, size: tuple[int, int]) -> Picture | str:
    """Decode an image: RGB, upright, resized until it just covers `size` (bilinear, antialiased), the centre cropped.

    Transparency is dropped, 16 bits become 8, of several pictures in a file the first is taken, and a picture that the
    camera says to turn is turned.

    Returns:
        The picture; a string with the error for a bad file.

    Raises:
        InputError: the file cannot be read at all.
    """
    try:
        content = path.read_bytes()
    except OSError as error:  # says nothing about the picture, so it must not be kept as a bad one
        raise InputError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None
    try:
        with Image.open(io.BytesIO(content)) as file:
            notes = _notes(file)
            turn = _turn(file)
            swapped = turn in _QUARTERS
            width, height = file.size[::-1] if swapped else file.size
            if math.prod(covering(height, width, size)) > LARGEST:
                return f"{width}×{height} pixels are too long and narrow to cover {size[1]}×{size[0]}"
            height, width = covering(height, width, size)
            wanted = (height, width) if swapped else (width, height)
            file.draft("RGB", (2 * wanted[0], 2 * wanted[1]))  # a large JPEG is decoded smaller; the resize filters
            shown = _rgb(file).resize(wanted, Image.Resampling.BILINEAR)
            shown = shown if turn is None else shown.transpose(turn)
    except UnidentifiedImageError:
        return "not an image" if content else "the file is empty"
    except Image.DecompressionBombError:
        return f"too large to decode: more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels"
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        return first_line(error)
    top, left = margin(height, size[0]), margin(width, size[1])
    pixels = np.asarray(shown)[top : top + size[0], left : left + size[1]]
    return Picture(np.ascontiguousarray(pixels.transpose(2, 0, 1)), notes)


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest height and width of the same aspect ratio that cover `size`, rounded as torchvision does."""
    if size[0] * width >= size[1] * height:  # the picture is the wider one
        return size[0], max(size[1], size[0] * width // height)
    return max(size[0], size[1] * height // width), size[1]


def _notes(file: Image.Image) -> tuple[str, ...]:
    """List what decoding loses or changes."""
    several = getattr(file, "is_animated", False)
    transparent = file.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in file.info
    said = (
        (several, "the first of several pictures" if file.format != "GIF" else "first frame of an animation"),
        (transparent, "transparency dropped"),
        (file.mode.startswith("I"), "16 bits cut to 8"),
        (_turn(file) is not None, "turned upright"),
    )
    return tuple(note for holds, note in said if holds)


def _turn(file: Image.Image) -> Image.Transpose | None:
    """Return the turn that makes the picture upright; None for damaged EXIF data. Pillow itself turns TIFFs."""
    if file.format != "TIFF":
        with suppress(Exception):
            return _TURNS.get(file.getexif().get(ORIENTATION, 1))
    return None


def _rgb(picture: Image.Image) -> Image.Image:
    """Convert to RGB of 8 bits; Pillow itself would cut 16 bits off at 255."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture, dtype=np.float64).clip(0, 65535)
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("pixels are floats of unknown range")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Names of files in a data set that count as images."""
SHOWN = (*EXTENSIONS, ".gif")
"""Names of files in a folder that count as images; a file that is named itself may be called anything."""
LARGEST_FILE = 2**30
"""Bytes that one image file may have."""
AT_ONCE = 2**30
"""Bytes that all pictures may take while they are decoded; a larger one is decoded alone."""
GREY = (19595, 38470, 7471)
"""ITU-R 601 luma in 1/65536, as Pillow computes it."""


@dataclass(frozen=True)
class ImageFile:
    """A path to an image file, or a path with the problem that there is none."""

    path: Path
    problem: str = ""


def find_images(given: Sequence[str | Path]) -> list[ImageFile]:
    """Return the files that paths, folders (recursively) and patterns match, each once, in order.

    An argument that matches nothing is returned with its problem.
    """
    found: dict[str, ImageFile] = {}
    for word in given:
        for one in _of(str(word)):
            found.setdefault(str(one.path), one)
    return list(found.values())


def decode_pictures(files: Sequence[Path], size: tuple[int, int], channels: int) -> Iterator[Picture | str]:
    """Decode files in parallel and yield pictures channels×H×W, or the error of a bad file, in order."""
    memory = _Memory(AT_ONCE)

    def one(path: Path) -> Picture | str:
        with memory.holding(_needs(path)):
            return _read(path, size, channels)

    with ThreadPoolExecutor(_cores()) as pool:
        yield from pool.map(one, files)


class _Memory:
    """Limits the bytes that threads hold at once; an amount above the limit is held alone."""

    def __init__(self, total: int) -> None:
        self.total, self.held = total, 0
        self.changed = threading.Condition()

    @contextmanager
    def holding(self, amount: int) -> Iterator[None]:
        """Hold `amount` bytes inside the block."""
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
    """Estimate the bytes that decoding a file takes: its size, and four for each pixel of its header."""
    with suppress(Exception):  # decoding reports the error
        if path.is_file():  # a pipe would be waited for
            with Image.open(path) as file:
                return path.stat().st_size + 4 * math.prod(file.size)
    return 0


def _of(word: str) -> list[ImageFile]:
    path = Path(word).expanduser()
    try:
        if path.is_dir():
            files = sorted(_below(path))
            return [ImageFile(f) for f in files] or [ImageFile(path, f"no images in this folder ({', '.join(SHOWN)})")]
        if path.exists():
            return [ImageFile(path)]
        if glob.has_magic(word):
            found = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
            files = [f for m in map(Path, sorted(found)) for f in (sorted(_below(m)) if m.is_dir() else [m])]
            return [ImageFile(file) for file in files] or [ImageFile(path, "no file matches this pattern")]
    except OSError as error:  # a folder that may not be read, a name that is too long
        return [ImageFile(path, f"cannot be read: {error.strerror}")]
    return [ImageFile(path, "no such file or folder")]


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
