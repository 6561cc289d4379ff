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
from PIL import ExifTags, Image, UnidentifiedImageError

from robustfpd.data.transforms import crop_margin
from robustfpd.errors import InputError, first_line

Pixels = npt.NDArray[np.uint8]

AHEAD = 256
"""Number of files decoded ahead of the consumer; bounds the memory."""
LARGEST = 90_000_000
"""Largest number of pixels after resizing; Pillow itself refuses files of twice as many."""
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Extensions of image files in a data set."""
SHOWN = (*EXTENSIONS, ".gif")
"""Extensions of image files that `find_images` finds in a folder; a file given by its path may have any name."""
LARGEST_FILE = 2**30
"""Largest size of an image file in bytes."""
AT_ONCE = 2**30
"""Largest number of bytes decoded in parallel; a larger image is decoded alone."""
_ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_SWAPPED = tuple(_ROTATIONS[value] for value in (5, 6, 7, 8))
"""Transpositions that exchange width and height."""


@dataclass(frozen=True)
class Picture:
    """A decoded image."""

    pixels: Pixels
    """3×H×W."""
    notes: tuple[str, ...]
    """Short descriptions of changes other than resizing and cropping."""


def decode_pixels(paths: Sequence[Path], size: tuple[int, int]) -> Iterator[Pixels | str]:
    """Decode files in parallel and yield pixels 3×H×W uint8, or the error of a bad file, in order."""
    with ThreadPoolExecutor(_cores()) as pool:
        for start in range(0, len(paths), AHEAD):
            for image in pool.map(lambda path: picture(path, size), paths[start : start + AHEAD]):
                yield image if isinstance(image, str) else image.pixels


def picture(path: Path, size: tuple[int, int]) -> Picture | str:
    """Decode an image to RGB, rotate it upright, resize it until it just covers `size`, and crop the centre.

    Resizing is bilinear and antialiased. Transparency is dropped, 16 bits are reduced to 8, and of several images in a
    file the first is read.

    Returns:
        The picture; for a bad file the error as a string.

    Raises:
        InputError: the file cannot be read from disk.
    """
    try:
        content = path.read_bytes()
    except OSError as error:  # not a property of the image, so it must not be cached as a bad file
        raise InputError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None
    try:
        with Image.open(io.BytesIO(content)) as file:
            notes, rotation = _notes(file), _rotation(file)
            swapped = rotation in _SWAPPED
            width, height = file.size[::-1] if swapped else file.size
            high, wide = covering(height, width, size)
            if high * wide > LARGEST:
                return f"{width}×{height} pixels are too long and narrow to cover {size[1]}×{size[0]}"
            target = (high, wide) if swapped else (wide, high)
            file.draft("RGB", (2 * target[0], 2 * target[1]))  # a large JPEG is decoded smaller; the resize filters
            image = _rgb(file).resize(target, Image.Resampling.BILINEAR)
            image = image if rotation is None else image.transpose(rotation)
    except UnidentifiedImageError:
        return "not an image" if content else "the file is empty"
    except Image.DecompressionBombError:
        return f"too large to decode: more than {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels"
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        return first_line(error)
    top, left = crop_margin(high, size[0]), crop_margin(wide, size[1])
    pixels = np.asarray(image)[top : top + size[0], left : left + size[1]]
    return Picture(np.ascontiguousarray(pixels.transpose(2, 0, 1)), notes)


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest height and width of the same aspect ratio that cover `size`, rounded as torchvision does."""
    if size[0] * width >= size[1] * height:  # the image is wider than `size`
        return size[0], max(size[1], size[0] * width // height)
    return max(size[0], size[1] * height // width), size[1]


def _notes(file: Image.Image) -> tuple[str, ...]:
    """List what decoding loses or changes."""
    several = getattr(file, "is_animated", False)
    transparent = file.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in file.info
    notes = {
        "the first of several pictures" if file.format != "GIF" else "first frame of an animation": several,
        "transparency dropped": transparent,
        "16 bits cut to 8": file.mode.startswith("I"),
        "turned upright": _rotation(file) is not None,
    }
    return tuple(note for note, applies in notes.items() if applies)


def _rotation(file: Image.Image) -> Image.Transpose | None:
    """Return the transposition to the upright image; None for damaged EXIF data. Pillow itself rotates TIFFs."""
    if file.format != "TIFF":
        with suppress(Exception):
            return _ROTATIONS.get(file.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def _rgb(picture: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB; Pillow would clip 16-bit values at 255."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture, dtype=np.float64).clip(0, 65535)
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("pixels are floats of unknown range")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def _cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class ImageFile:
    """Path of an image file, or a path without one and the problem."""

    path: Path
    problem: str = ""


def find_images(arguments: Sequence[str | Path]) -> list[ImageFile]:
    """Return the files that paths, folders (recursively) and patterns match, without duplicates, in order.

    An argument that matches no file is returned with its problem.
    """
    files: dict[str, ImageFile] = {}
    for argument in arguments:
        for file in _match(str(argument)):
            files.setdefault(str(file.path), file)
    return list(files.values())


def decode_pictures(files: Sequence[Path], size: tuple[int, int], channels: int) -> Iterator[Picture | str]:
    """Decode files in parallel and yield pictures channels×H×W, or the error of a bad file, in order."""
    memory = _Memory(AT_ONCE)

    def read(path: Path) -> Picture | str:
        with memory.hold(_decoded_size(path)):
            return _read(path, size, channels)

    with ThreadPoolExecutor(_cores()) as pool:
        yield from pool.map(read, files)


class _Memory:
    """Limits the bytes that threads hold at once; an amount above the limit is held alone."""

    def __init__(self, total: int) -> None:
        self.total, self.held = total, 0
        self.changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
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


def _decoded_size(path: Path) -> int:
    """Estimate the bytes that decoding a file takes: its size, and four for each pixel in its header."""
    with suppress(Exception):  # decoding reports the error
        if path.is_file():  # opening a pipe would block
            with Image.open(path) as file:
                return path.stat().st_size + 4 * math.prod(file.size)
    return 0


def _match(argument: str) -> list[ImageFile]:
    """List the files of a path, folder or pattern."""
    path = Path(argument).expanduser()
    try:
        if path.is_dir():
            images = [ImageFile(file) for file in sorted(_below(path))]
            return images or [ImageFile(path, f"no images in this folder ({', '.join(SHOWN)})")]
        if path.exists():
            return [ImageFile(path)]
        if glob.has_magic(argument):
            matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
            files = [f for m in map(Path, matches) for f in (sorted(_below(m)) if m.is_dir() else [m])]
            return [ImageFile(file) for file in files] or [ImageFile(path, "no file matches this pattern")]
    except OSError as error:  # a folder without read permission, a name that is too long
        return [ImageFile(path, f"cannot be read: {error.strerror}")]
    return [ImageFile(path, "no such file or folder")]


def _below(folder: Path) -> Iterator[Path]:
    """Yield image files in a folder and all folders below it, except hidden ones."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent) / f for f in files if not f.startswith(".") and f.lower().endswith(SHOWN))


def _read(path: Path, size: tuple[int, int], channels: int) -> Picture | str:
    try:
        if not path.is_file():  # opening a pipe would block
            return "not a regular file"
        if path.stat().st_size > LARGEST_FILE:
            return "too large to decode: more than 1 GB"
        image = picture(path, size)
    except InputError as error:
        return str(error).removeprefix(f"{path} ")
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except MemoryError:
        return "too large to decode: not enough memory"
    if isinstance(image, str) or channels == 3:
        return image
    grey = Image.fromarray(np.ascontiguousarray(image.pixels.transpose(1, 2, 0))).convert("L")
    return Picture(np.array(grey)[None], image.notes)
