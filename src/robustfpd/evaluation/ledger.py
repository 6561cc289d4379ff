"""The ledger: one row per image and attack, written as the evaluation goes, so that one that was killed goes on."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from robustfpd.config import Config
from robustfpd.errors import InputError, first_line
from robustfpd.io import write_json, write_text

Outcome = Literal["misclassified", "robust", "failed"]
CLEAN = "clean"
"""What the rows of the images as they are call their attack."""


class LedgerRow(Config):
    """One image under one attack at one radius."""

    image: int
    """Its place in the data that was given, before `num_images` were drawn."""
    label: int
    clean_prediction: int
    attack: str
    """`clean` in the rows of the images themselves, misclassified ones included."""
    eps: float
    adversarial_prediction: int
    distance: float
    """Norm of the perturbation; the smallest that was found where the attack looks for that."""
    outcome: Outcome
    """`failed` where the attack raised an error or left its ball."""
    margin: float
    """Best wrong logit minus the true one, over the largest minus the third, at the point that was found."""
    queries: int = 0
    """Forward passes spent on it."""
    gradients: int = 0
    """Backward passes spent on it."""
    seconds: float = 0.0
    """Its share of the batch's time."""
    seed: int = 0
    note: str = ""
    """What went wrong."""


class OtherEvaluation(InputError):
    """Files that should be this evaluation's are another's."""


class Ledger:
    """Rows in the order they were found, kept in a file as they come, where one is given.

    An evaluation that is repeated after it was killed asks for the same batches in the same order: `replay` gives the
    rows that are there, and the file is cut where they end.
    """

    def __init__(self, path: Path | None = None, settings: Mapping[str, Any] | None = None) -> None:
        self.rows: list[LedgerRow] = []
        self.path: Path | None = None
        self._known: list[LedgerRow] = []
        self._next = 0
        if path is not None:
            self.open(path, settings or {})

    def open(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Keep rows in this file, and take up those that an evaluation with these settings left there."""
        self._known, self.path = self._open(path, settings), path

    def replay(self, attack: str, eps: float, images: Sequence[int]) -> list[LedgerRow] | None:
        """Rows of a batch that was finished before; None where it was not, and whatever followed is dropped."""
        known = self._known[self._next : self._next + len(images)]
        asked = [(attack, eps, image) for image in images]
        if [(r.attack, r.eps, r.image) for r in known] != asked:
            self._cut()
            return None
        self._next += len(images)
        self.rows.extend(known)
        return known

    def add(self, rows: Sequence[LedgerRow]) -> None:
        """Keep the rows of one batch."""
        self.rows.extend(rows)
        if self.path is None:
            return
        with writing(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            file.write(_lines(rows))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """The evaluation is done: nothing is left to be continued."""
        if self.path is not None:
            _settings_file(self.path).unlink(missing_ok=True)

    def _open(self, path: Path, settings: Mapping[str, Any]) -> list[LedgerRow]:
        """Rows of an unfinished evaluation with these settings; one with others is an InputError."""
        marker = _settings_file(path)
        asked = json.loads(json.dumps(settings))
        if not marker.is_file():
            return self._begin(path, asked)
        try:
            found = json.loads(marker.read_text())
        except ValueError:
            raise InputError(f"{marker} is damaged; delete it and {path} to start anew") from None
        try:
            rows = read_rows(path, cut_off=True) if path.is_file() else []
        except UnicodeDecodeError:
            raise InputError(f"{path} is damaged; delete it and {marker.name} to start anew") from None
        if not rows:
            return self._begin(path, asked)
        if not isinstance(found, dict):
            raise InputError(f"{marker} is damaged; delete it and {path} to start anew")
        differing = [k for k in {*asked, *found} if asked.get(k) != found.get(k)]
        differing.sort(key=lambda k: (k == "behaviour", k))  # which tells nobody anything, where others differ as well
        if differing:
            name = differing[0]
            raise OtherEvaluation(
                f"{path.parent} holds an unfinished evaluation with {name}={found.get(name)!r}, this one has "
                f"{asked.get(name)!r}; give another folder, or delete {marker.name} and {path.name} to start anew"
            )
        write_rows(path, rows)  # without a last line that was cut off
        return rows

    def _begin(self, path: Path, settings: Mapping[str, Any]) -> list[LedgerRow]:
        with writing(path):
            write_rows(path, [])
            write_json(_settings_file(path), settings)
        return []

    def _cut(self) -> None:
        if self._next < len(self._known) and self.path is not None:
            write_rows(self.path, self.rows)
        self._known, self._next = [], 0


def _settings_file(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".json").removesuffix(".ledger.csv") + ".unfinished.json")


def is_unfinished(path: Path) -> bool:
    """Whether the evaluation with this record, or ledger, was begun and not ended."""
    return _settings_file(path).is_file()


def write_rows(path: Path, rows: Sequence[LedgerRow]) -> None:
    """Write a whole ledger atomically."""
    with writing(path):
        write_text(path, _header() + _lines(rows))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make a full disk, and the like, an InputError; what was in the file before is there still."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "; what it holds is kept: make room and repeat the evaluation, it goes on from there" if full else ""
        raise InputError(f"{path} cannot be written: {first_line(error)}{advice}") from error


def read_rows(path: Path, *, cut_off: bool = False) -> list[LedgerRow]:
    """Read a ledger; with `cut_off`, a last line that was not written to its end is left out."""
    from robustfpd.config import parse

    content = path.read_bytes()
    if cut_off:  # in bytes: the cut may go through a character
        content = content[: content.rfind(b"\n") + 1]
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    return [parse(LedgerRow, row, str(path)) for row in rows]


def _header() -> str:
    return ",".join(LedgerRow.model_fields) + "\n"


def _lines(rows: Sequence[LedgerRow]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(row.model_dump().values() for row in rows)
    return buffer.getvalue()
