"""The ledger: a CSV row per image and attack, written during the evaluation, so that it can be resumed."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from robustfpd.config import Config, parse
from robustfpd.errors import InputError
from robustfpd.evaluation.saved_checks import SavedChecks
from robustfpd.io import write_json, write_text, writing

Outcome = Literal["misclassified", "robust", "failed"]
CHECKS = ".checks.jsonl"
"""Ends the name of the file of finished checks, which is deleted at the end."""
CLEAN = "clean"
"""`attack` of the rows of clean images."""


class LedgerRow(Config):
    """One image under one attack at one radius."""

    image: int
    """Index in the data given, before `num_images` were drawn."""
    label: int
    clean_prediction: int
    attack: str
    """The attack's label in the suite; `clean` in the rows of clean images."""
    eps: float
    adversarial_prediction: int
    distance: float
    """Norm of the perturbation."""
    outcome: Outcome
    """`failed`: the attack raised an error or left its ball."""
    margin: float
    """Best wrong logit minus the true one, of pre-squash logits where there are any; 0 where the attack raised an
    error. `outcome` has the decision."""
    queries: int = 0
    """Forward passes."""
    gradients: int = 0
    """Backward passes."""
    seconds: float = 0.0
    """Time of the batch over its number of images."""
    seed: int = 0
    note: str = ""
    """Why the outcome is `failed`, or what the attack changed in the classifier."""


class OtherEvaluation(InputError):
    """The files in `out_dir` belong to another evaluation."""


class Ledger:
    """Rows in the order of the evaluation, written to a file as they come if one is opened.

    An interrupted evaluation that is repeated runs the same batches in the same order: `replay` returns the rows that
    the file has, and the file is truncated where these end.
    """

    def __init__(self) -> None:
        self.rows: list[LedgerRow] = []
        self.path: Path | None = None
        self.checks = SavedChecks()
        self._known: list[LedgerRow] = []
        self._next = 0

    def open(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Write rows to this file, and read those that an interrupted evaluation with these settings left there.

        Raises:
            OtherEvaluation: the file belongs to an interrupted evaluation with other settings.
        """
        given = json.loads(json.dumps(settings))
        rows = _interrupted_rows(path, given)
        self.checks.open(path.with_name(_stem(path) + CHECKS), resumed=_settings(path) == given)
        with writing(path):
            write_rows(path, rows)  # without an incomplete last line
            write_json(_settings_file(path), given)
        self._known, self.path = rows, path

    def replay(self, attack: str, eps: float, images: Sequence[int]) -> list[LedgerRow] | None:
        """Return the rows of a batch from before the interruption; None without them, and later rows are dropped."""
        known = self._known[self._next : self._next + len(images)]
        expected = [(attack, eps, image) for image in images]
        if [(r.attack, r.eps, r.image) for r in known] != expected:
            self._truncate()
            return None
        self._next += len(images)
        self.rows.extend(known)
        return known

    def add(self, rows: Sequence[LedgerRow]) -> None:
        """Add the rows of one batch."""
        self.rows.extend(rows)
        if self.path is not None:
            with writing(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
                file.write(_lines(rows))
                file.flush()
                os.fsync(file.fileno())

    def finish(self) -> None:
        """Mark the evaluation as finished."""
        if self.path is not None:
            _settings_file(self.path).unlink(missing_ok=True)
            self.checks.finish()

    def _truncate(self) -> None:
        if self._next < len(self._known) and self.path is not None:
            write_rows(self.path, self.rows)
        self._known, self._next = [], 0


def _stem(path: Path) -> str:
    return path.name.removesuffix(".json").removesuffix(".ledger.csv")


def _settings_file(path: Path) -> Path:
    return path.with_name(_stem(path) + ".unfinished.json")


def _settings(path: Path) -> Any:
    """Return the settings of an interrupted evaluation; None without one, or where the file is damaged."""
    marker = _settings_file(path)
    try:
        return json.loads(marker.read_text()) if marker.is_file() else None
    except ValueError:
        return None


def _interrupted_rows(path: Path, settings: Mapping[str, Any]) -> list[LedgerRow]:
    """Return the rows of an interrupted evaluation; raise OtherEvaluation if its settings differ."""
    marker = _settings_file(path)
    if not marker.is_file():
        return []
    found = _settings(path)
    if not isinstance(found, dict):
        raise InputError(f"{marker} is damaged; delete it and {path} to start again")
    try:
        rows = read_rows(path, cut_off=True) if path.is_file() else []
    except UnicodeDecodeError:
        raise InputError(f"{path} is damaged; delete it and {marker.name} to start again") from None
    differing = [k for k in {*settings, *found} if settings.get(k) != found.get(k)] if rows else []
    if differing:
        name = min(differing, key=lambda k: (k == "behaviour", k))  # a hash, so last
        raise OtherEvaluation(
            f"{path.parent} holds an unfinished evaluation with {name}={found.get(name)!r}, this one has "
            f"{settings.get(name)!r}; give another folder, or delete {marker.name} and {path.name} to start again"
        )
    return rows


def is_unfinished(path: Path) -> bool:
    """Return whether the evaluation with this record or ledger was interrupted."""
    return _settings_file(path).is_file()


def write_rows(path: Path, rows: Sequence[LedgerRow]) -> None:
    """Write a whole ledger atomically."""
    with writing(path):
        write_text(path, ",".join(LedgerRow.model_fields) + "\n" + _lines(rows))


def read_rows(path: Path, *, cut_off: bool = False) -> list[LedgerRow]:
    """Read a ledger; with `cut_off`, without an incomplete last line."""
    content = path.read_bytes()
    if cut_off:  # in bytes: a character may be incomplete
        content = content[: content.rfind(b"\n") + 1]
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    return [parse(LedgerRow, row, str(path)) for row in rows]


def _lines(rows: Sequence[LedgerRow]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(row.model_dump().values() for row in rows)
    return buffer.getvalue()
