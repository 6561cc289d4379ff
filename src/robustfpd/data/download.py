"""Downloads archives of class folders through torchvision, and detects interrupted downloads.

torchvision accepts any folder of the right name as the complete data set, so a marker file lies beside it during the
download. A folder without the marker is used as it is, unless parts of an archive lie beside it and it has fewer images
than published.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from robustfpd.config import DataConfig
from robustfpd.data.image_set import DatasetInfo
from robustfpd.errors import MissingDataError, first_line

NOTE = ".robustfpd-fetching"
"""Marker file beside a data set during its download; it remains after an interrupt."""


@dataclass(frozen=True)
class Archive:
    """How torchvision lays out a data set that it unpacks from an archive."""

    class_name: str
    folder: str
    """Below the data root; holds the class folders."""
    leftovers: tuple[str, ...]
    """Files beside the folder while it is unpacked."""
    images: int
    """Number of images of the complete data set."""


def archive_folder(archive: Archive, dataset: DatasetInfo, config: DataConfig) -> Path:
    """Return the folder of class folders, downloaded if it is missing or incomplete and `config.download` is on.

    Raises:
        MissingDataError: it is missing, incomplete, or cannot be fetched.
    """
    folder = Path(config.root).expanduser() / archive.folder
    problem = interrupted(archive, folder)
    if folder.is_dir() and problem is None:
        return folder
    if config.download:
        _fetch(archive, dataset, folder)
        return folder
    if problem is None:
        raise MissingDataError(
            f"{dataset.name} is not there: looked in {folder.absolute()}; add --download to fetch it "
            f"({dataset.download}), or give the folder that holds {archive.folder} as --data-root"
        )
    raise MissingDataError(
        f"{dataset.name} in {folder.absolute()} is left from an interrupted download ({problem}); add --download to "
        "download it again, or delete the leftover files beside the folder to use these images"
    )


def interrupted(archive: Archive, folder: Path) -> str | None:
    """Return why the folder may be incomplete; None if it is complete or not there."""
    if (folder.parent / NOTE).exists():
        return f"{NOTE} lies beside it"
    leftover = next((name for name in archive.leftovers if (folder.parent / name).exists()), None)
    if leftover is None or not folder.is_dir():
        return None
    count = sum(1 for _ in folder.rglob("*.jpg"))
    return f"{count:,} of {archive.images:,} images, and {leftover} beside them" if count < archive.images else None


def _fetch(archive: Archive, dataset: DatasetInfo, folder: Path) -> None:
    """Download and unpack with torchvision, which reuses an archive whose checksum matches."""
    import torchvision.datasets

    parent, note = folder.parent, folder.parent / NOTE
    leftovers = [parent / name for name in archive.leftovers]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(parent / f"{NOTE}.lock"):
            if folder.is_dir() and interrupted(archive, folder) is None:
                return  # another process has downloaded it
            users = set() if note.exists() else {path for path in leftovers if path.is_file()}
            note.touch()
            for path in (folder, *leftovers):
                if path.is_dir():
                    move_aside(path)
            getattr(torchvision.datasets, archive.class_name)(parent.parent, download=True)
            for path in leftovers:
                if path not in users:  # an archive that was there before may be the user's
                    path.unlink(missing_ok=True)
            note.unlink()
    except (RuntimeError, OSError, ValueError, EOFError, LookupError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise MissingDataError(
            f"{dataset.name} could not be fetched into {parent.absolute()} ({first_line(error)}); run again to continue"
        ) from None


def move_aside(folder: Path) -> Path:
    """Rename a folder to make room for a download; it may hold the user's own images, so it is not deleted."""
    names = (f"{folder.name}.incomplete{suffix}" for suffix in ("", *range(2, 1000)))
    return folder.rename(next(path for path in map(folder.with_name, names) if not path.exists()))


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold a file lock against other downloads of the same data set; no lock if the folder is not writable."""
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path))
        yield
