"""Which data sets are there, where, and what they take on disk; nothing is decoded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from robustfpd.data.caltech import ARCHIVES
from robustfpd.data.datasets import info, names
from robustfpd.data.decode_cache import SUFFIX, images_folder
from robustfpd.data.described import DatasetInfo
from robustfpd.data.download import interrupted

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Found:
    """A data set as it lies on this machine."""

    info: DatasetInfo
    there: bool
    """Whole, as far as names tell; always for what comes with a package, never for `folder`, which may be anywhere."""
    images: int | None
    """Image files; None where files hold many images each, or are not there."""
    classes: int
    """Folders of classes; where there are no such folders, the classes it is known to have."""
    size: int
    """Bytes below the data root."""
    cached: int
    """Bytes of decoded images in the cache."""


def inventory(root: str | Path, cache: str | Path | None = None) -> list[Found]:
    """Look for every data set below `root`, and for its decoded images in the cache (None: the cache folder)."""
    return [_find(info(name), Path(root).expanduser(), images_folder(cache)) for name in names()]


def _find(described: DatasetInfo, root: Path, cache: Path) -> Found:
    places = [root / file for file in described.files]
    archive = ARCHIVES.get(described.name)
    partly = archive is not None and interrupted(archive, places[0]) is not None
    there = described.name != "folder" and not partly and all(place.exists() for place in places)
    images, classes, size = 0, 0, 0
    for place in places:
        for file in _files(place):
            size += file.stat().st_size
            images += file.name.lower().endswith(EXTENSIONS)
        classes += sum(1 for entry in os.scandir(place) if entry.is_dir()) if images else 0
    there = there and (size > 0 or not places)  # empty folders hold nothing
    kept = cache.glob(f"{described.name}-*{SUFFIX}")
    cached = sum(path.stat().st_size for path in kept)
    return Found(described, there, images or None, classes or described.num_classes, size, cached)


def _files(place: Path) -> Iterator[os.DirEntry[str] | Path]:
    """All files at or below `place`."""
    if place.is_file():
        yield place
    if not place.is_dir():
        return
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(Path(entry.path))
            elif entry.is_file():
                yield entry
