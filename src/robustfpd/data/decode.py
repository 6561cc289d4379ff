"""One image file to uint8 pixels of a given size."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from robustfpd.data.image_set import margin
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
    """An image as the network's data set would hold it."""

    pixels: Pixels
    """3×H×W."""
    notes: tuple[str, ...]
    """What was done beside resizing and cropping, for whoever wonders."""


def decoded(paths: Sequence[Path], size: tuple[int, int]) -> Iterator[Pixels | str]:
    """Decode files in parallel and yield what `decode` gives for each, in order."""
    with ThreadPoolExecutor(_cores()) as pool:
        for start in range(0, len(paths), AHEAD):
            yield from pool.map(lambda path: decode(path, size), paths[start : start + AHEAD])


def decode(path: Path, size: tuple[int, int]) -> Pixels | str:
    """The pixels of `picture`, 3×H×W uint8; or, where the file holds no whole image, why not."""
    found = picture(path, size)
    return found if isinstance(found, str) else found.pixels


def picture(path: Path, size: tuple[int, int]) -> Picture | str:
    """Decode an image: RGB, upright, resized until it just covers `size` (bilinear, antialiased), the centre cropped.

    Transparency is dropped, 16 bits become 8, of several pictures in a file the first is taken, and a picture that the
    camera says to turn is turned.

    Returns:
        The picture; or, where the file holds no whole image, why not.

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
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        return first_line(error)
    top, left = margin(height, size[0]), margin(width, size[1])
    pixels = np.asarray(shown)[top : top + size[0], left : left + size[1]]
    return Picture(np.ascontiguousarray(pixels.transpose(2, 0, 1)), notes)


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The smallest height and width of the same proportions that cover `size`, rounded down as torchvision does."""
    if size[0] * width >= size[1] * height:  # the picture is the wider one
        return size[0], max(size[1], size[0] * width // height)
    return max(size[0], size[1] * height // width), size[1]


def _notes(file: Image.Image) -> tuple[str, ...]:
    """What will be lost or changed, in a few words each."""
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
    """How to turn the picture upright; damaged EXIF data say nothing. Pillow itself turns TIFFs."""
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
