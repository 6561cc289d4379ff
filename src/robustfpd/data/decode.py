"""One image file to uint8 pixels of a given size."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from robustfpd.data.images import margin
from robustfpd.errors import InputError, first_line

Pixels = npt.NDArray[np.uint8]

AHEAD = 256
"""Files decoded before the first of them must be taken; bounds the memory."""


def decoded(paths: Sequence[Path], size: tuple[int, int]) -> Iterator[Pixels | str]:
    """Decode files in parallel and yield what `decode` gives for each, in order."""
    with ThreadPoolExecutor(_cores()) as pool:
        for start in range(0, len(paths), AHEAD):
            yield from pool.map(lambda path: decode(path, size), paths[start : start + AHEAD])


def decode(path: Path, size: tuple[int, int]) -> Pixels | str:
    """Decode an image: RGB, resized until it just covers `size` (bilinear, antialiased), the centre cropped.

    Transparency is dropped, 16 bits become 8.

    Returns:
        3×H×W uint8; or, where the file holds no whole image, why not.

    Raises:
        InputError: the file cannot be read at all.
    """
    try:
        content = path.read_bytes()
    except OSError as error:  # says nothing about the picture, so it must not be kept as a bad one
        raise InputError(f"{path} cannot be read: {error.strerror or first_line(error)}") from None
    try:
        with Image.open(io.BytesIO(content)) as file:
            width, height = covering(file.height, file.width, size)[::-1]
            file.draft("RGB", (2 * width, 2 * height))  # a large JPEG is decoded smaller; the resize still filters
            picture = _rgb(file).resize((width, height), Image.Resampling.BILINEAR)
    except UnidentifiedImageError:
        return "not an image"
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        return first_line(error)
    top, left = margin(height, size[0]), margin(width, size[1])
    pixels = np.asarray(picture)[top : top + size[0], left : left + size[1]]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The smallest height and width of the same proportions that cover `size`, rounded down as torchvision does."""
    if size[0] * width >= size[1] * height:  # the picture is the wider one
        return size[0], max(size[1], size[0] * width // height)
    return max(size[0], size[1] * height // width), size[1]


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
