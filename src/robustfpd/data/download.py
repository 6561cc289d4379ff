"""Downloads archives of class folders through torchvision, and detects interrupted downloads.

torchvision accepts any folder of the right name as the complete data set. So a marker file lies beside it during the
download. A folder without the marker is the user's own and used as it is, unless the rest of an archive lies beside it
and it has fewer images than published.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from robustfpd.config import DataConfig
from robustfpd.data.image_set import DatasetInfo
from robustfpd.errors import MissingDataError, first_line

NOTE = ".robustfpd-fetching"
"""Marker file beside a data set during its download; an interrupt leaves it behind."""


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


def archive_folder(archive: Archive, described: DatasetInfo, config: DataConfig) -> Path:
    """Return the folder of class folders, downloaded if it is missing or incomplete and `config.download` is on.

    Raises:
        MissingDataError: it is not there, not whole, or cannot be fetched.
    """
    folder = Path(config.root).expanduser() / archive.folder
    doubt = interrupted(archive, folder)
    if folder.is_dir() and doubt is None:
        return folder
    if config.download:
        _fetch(archive, described, folder)
        return folder
    if doubt is None:
        raise MissingDataError(
            f"{described.name} is not there: looked in {folder.absolute()}; add --download to fetch it "
            f"({described.download}), or give the folder that holds {archive.folder} as --data-root"
        )
    raise MissingDataError(
        f"{described.name} in {folder.absolute()} is the rest of an interrupted download ({doubt}); add --download to "
        f"fetch it anew, or, where the images are as you want them, delete what lies beside it"
    )


def interrupted(archive: Archive, folder: Path) -> str | None:
    """Return why the folder may be incomplete; None if it is complete or not there."""
    if (folder.parent / NOTE).exists():
        return f"{NOTE} lies beside it"
    left = next((name for name in archive.leftovers if (folder.parent / name).exists()), None)
    if left is None or not folder.is_dir():
        return None
    found = sum(1 for path in folder.rglob("*.jpg"))
    return f"{found:,} of {archive.images:,} images, and {left} beside them" if found < archive.images else None


def _fetch(archive: Archive, described: DatasetInfo, folder: Path) -> None:
    """Download and unpack by torchvision, which keeps an archive whose checksum is right."""
    import torchvision.datasets

    home, note = folder.parent, folder.parent / NOTE
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f"{NOTE}.lock"):
            if folder.is_dir() and interrupted(archive, folder) is None:
                return  # another process was quicker
            ours = note.exists()
            note.touch()
            before = set() if ours else {name for name in archive.leftovers if (home / name).is_file()}
            for part in (folder, *(home / name for name in archive.leftovers)):
                if part.is_dir():
                    move_aside(part)
            getattr(torchvision.datasets, archive.class_name)(home.parent, download=True)
            for name in archive.leftovers:
                if name not in before:  # an archive that was there may be the user's
                    (home / name).unlink(missing_ok=True)
            note.unlink()
    except (RuntimeError, OSError, ValueError, EOFError, LookupError, tarfile.TarError, zipfile.BadZipFile) as error:
        raise MissingDataError(
            f"{described.name} could not be fetched into {home.absolute()} ({first_line(error)}); run again to go on"
        ) from None


def move_aside(folder: Path) -> Path:
    """Rename a folder to make room for a download; it may hold the user's own images, so it is not deleted."""
    names = (f"{folder.name}.incomplete{suffix}" for suffix in ("", *map(str, range(2, 1000))))
    aside = next(path for path in map(folder.with_name, names) if not path.exists())
    return folder.rename(aside)


@contextmanager
def exclusive_lock(lock: Path) -> Iterator[None]:
    """Hold a lock against other processes that download the same; no lock where nothing can be written."""
    held = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        held.release()
