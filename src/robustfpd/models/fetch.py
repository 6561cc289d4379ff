"""One file from an address into a folder, checked before it counts."""

from __future__ import annotations

import hashlib
import os
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen

from robustfpd.errors import InputError, MissingDataError, first_line

SCHEMES = ("http", "https", "file")
TIMEOUT_SECONDS = 30
"""How long a server may stay silent."""


def check_address(address: str, source: str) -> None:
    """Refuse what is not an http, https or file address; `source` is who gave it."""
    if urlsplit(address).scheme not in SCHEMES:
        raise InputError(
            f"{source} must be an http, https or file address, found {address!r}; a folder is file:///path/to/it"
        )


def fetch(address: str, path: Path, sha256: str, size: int) -> None:
    """Fetch a file of known content into `path`; nothing is left behind when it is not that content.

    Args:
        address: http, https or file.
        path: where the file goes; its folder is made.
        sha256: of its content.
        size: in bytes; no more is read, and it is held in memory.

    Raises:
        MissingDataError: nothing answers there, or the file is cut off.
        InputError: another content, or a folder that cannot be written.
    """
    try:
        with urlopen(address, timeout=TIMEOUT_SECONDS) as response:  # not torch.hub's: it reads without a limit
            content = response.read(size + 1)
    except HTTPError as error:
        raise MissingDataError(f"{address} is not there: the server says {error.code} {error.reason}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise MissingDataError(f"{address} cannot be fetched: {first_line(error)}") from None
    if len(content) < size:
        raise MissingDataError(f"{address} ended after {len(content):,} of {size:,} bytes; try again")
    found = hashlib.sha256(content).hexdigest()
    if len(content) > size or found != sha256:
        what = f"more than {size:,} bytes" if len(content) > size else f"SHA-256 {found}"
        raise InputError(
            f"{address} is another file, so it was not kept: expected {size:,} bytes with SHA-256 {sha256}, "
            f"found {what}; it may belong to another version of robustfpd"
        )
    _write(path, content)


def _write(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({first_line(error)}); set ROBUSTFPD_CACHE to a folder that can"
        ) from None
