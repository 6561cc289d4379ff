"""Atomic writes, the cache folder, and downloads with a hash check.

After an atomic write that is interrupted, the old file or folder is unchanged.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from robustfpd.errors import InputError, MissingDataError, first_line

CACHE_VARIABLE = "ROBUSTFPD_CACHE"


def cache_folder() -> Path:
    """Return the folder of decoded images and downloaded models, which may not exist yet.

    It is the folder in ROBUSTFPD_CACHE, else `robustfpd` in the user's cache folder.
    """
    folder = os.environ.get(CACHE_VARIABLE)
    if folder:
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "robustfpd"


@contextmanager
def atomic_path(path: Path, *, concurrent: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the same folder; it replaces `path` when the block ends without an error.

    Args:
        path: the file to write; its folder is created.
        concurrent: give each process a different temporary path, so that several may write this file at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial" if concurrent else f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes, *, concurrent: bool = False) -> None:
    """Write a file atomically."""
    with atomic_path(path, concurrent=concurrent) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically, without translation of line ends."""
    write_bytes(path, text.encode())


def write_json(path: Path, values: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows atomically; the first row's keys are the header."""
    with atomic_path(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise errors of the file system, such as a full disk, as InputError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; free some space and run it again" if full else ""
        raise InputError(f"{path} cannot be written: {first_line(error)}{advice}") from error


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a new, empty folder; it replaces `folder` when the block ends without an error."""
    current = readable_folder(folder)
    if current != folder:
        current.rename(folder.resolve())
    folder = folder.resolve()  # keep a symbolic link and replace its target
    new, old = folder.with_name(f".{folder.name}.new"), _old_folder(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def readable_folder(folder: Path) -> Path:
    """Return `folder`, or its old version if `replace_folder` was interrupted between its two renames.

    The old version is not renamed back, because the writer may still be running.
    """
    old = _old_folder(folder)
    return old if old.is_dir() and not folder.exists() else folder


def _old_folder(folder: Path) -> Path:
    target = folder.resolve()
    return target.with_name(f".{target.name}.old")


def check_url(url: str, source: str) -> None:
    """Raise an InputError unless `url` is an http, https or file address; `source` names the setting."""
    if urlsplit(url).scheme not in ("http", "https", "file"):
        raise InputError(
            f"{source} must be an http, https or file address, found {url!r}; a folder is file:///path/to/it"
        )


def download(url: str, path: Path, sha256: str, size: int) -> None:
    """Download a file into memory, check its content, and write it to `path`.

    Args:
        url: an http, https or file address.
        path: path of the file; its folder is created.
        sha256: expected hash of the content.
        size: expected size in bytes.

    Raises:
        MissingDataError: the file does not exist, cannot be downloaded, or is truncated.
        InputError: the content differs, or `path` cannot be written.
    """
    try:
        with urlopen(url, timeout=30) as response:  # torch.hub's download reads without a limit
            content = response.read(size + 1)
    except HTTPError as error:
        raise MissingDataError(f"{url} is not there: the server answered {error.code} {error.reason}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise MissingDataError(f"{url} cannot be fetched: {first_line(error)}") from None
    if len(content) < size:
        raise MissingDataError(f"{url} ended after {len(content):,} of {size:,} bytes; try again")
    digest = hashlib.sha256(content).hexdigest()
    if len(content) > size or digest != sha256:
        actual = f"more than {size:,} bytes" if len(content) > size else f"SHA-256 {digest}"
        raise InputError(
            f"{url} has unexpected content and was not saved: expected {size:,} bytes with SHA-256 {sha256}, "
            f"found {actual}; it may belong to another version of robustfpd"
        )
    try:
        write_bytes(path, content, concurrent=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({first_line(error)}); set {CACHE_VARIABLE} to a writable folder"
        ) from None
