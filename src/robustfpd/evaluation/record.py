"""What an evaluation found, as JSON and back."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from robustfpd.config import Config, Norm, parse
from robustfpd.errors import InputError, MissingDataError
from robustfpd.provenance import write_json

FORMAT = 1


class Proportion(Config):
    """k of n images, with the 95 % Wilson interval."""

    count: int
    total: int
    low: float
    high: float

    @classmethod
    def of(cls, count: int, total: int) -> Proportion:
        """Count `count` of `total` images."""
        from scipy.stats import binomtest

        interval = binomtest(count, total).proportion_ci(confidence_level=0.95, method="wilson")
        return cls(count=count, total=total, low=float(interval.low), high=float(interval.high))

    @property
    def value(self) -> float:
        """The fraction k/n."""
        return self.count / self.total

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


class AttackResult(Config):
    """One attack at one radius."""

    attack: str
    eps: float
    attacked: int
    """Images it was tried on: those that still stood, or all that were classified rightly."""
    fooled: int
    """Of these, images it turned."""
    accuracy: Proportion | None = None
    """Accuracy under this attack alone; known only when it was tried on all images."""
    seconds: float


class WorstCase(Config):
    """Images that withstood every attack at a radius and at all smaller ones."""

    eps: float
    robust: Proportion


class LedgerRow(Config):
    """One image under one attack at one radius."""

    image: int
    """Its place in the data that was given, before `num_images` were drawn."""
    label: int
    clean_prediction: int
    attack: str
    eps: float
    adversarial_prediction: int
    distance: float
    """Norm of the perturbation."""


class EvaluationRecord(Config):
    """The result of an evaluation; fractions are of all images, misclassified ones included."""

    format: int = FORMAT
    subject: str
    """What was attacked."""
    suite: str
    norm: Norm
    seed: int
    batch_size: int
    every_attack: bool
    clean: Proportion
    worst_case: tuple[WorstCase, ...]
    attacks: tuple[AttackResult, ...]
    ledger: tuple[LedgerRow, ...] = ()
    data_sha256: str
    """Of the images as 8-bit pixels, and the labels."""
    weights_sha256: str | None = None
    """Of the classifier's weights; None where they cannot be read as bytes, and in records from before this field."""
    environment: dict[str, Any]

    @property
    def num_images(self) -> int:
        """Number of images."""
        return self.clean.total

    @property
    def clean_accuracy(self) -> float:
        """Fraction of images classified rightly without an attack."""
        return self.clean.value

    @property
    def robust_accuracy(self) -> float:
        """Fraction that withstood every attack at the largest radius; see `worst_case` for the others."""
        return self.worst_case[-1].robust.value

    def save(self, path: Path) -> Path:
        """Write JSON, and the ledger as CSV beside it; return the JSON's path."""
        ledger = path.with_suffix(".ledger.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = ledger.with_name(ledger.name + ".new")
        with partial.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(LedgerRow.model_fields)
            writer.writerows(row.model_dump().values() for row in self.ledger)
        partial.replace(ledger)
        write_json(path, self.model_dump(mode="json", exclude={"ledger"}))
        return path

    @classmethod
    def load(cls, path: Path) -> EvaluationRecord:
        """Read what `save` wrote; a missing or damaged file is an InputError."""
        ledger = path.with_suffix(".ledger.csv")
        if not path.is_file():
            raise MissingDataError(f"no evaluation in {path.absolute()}; run robustfpd evaluate first")
        try:
            values = json.loads(path.read_text())
            rows = _rows(ledger)
        except (ValueError, OSError, csv.Error) as error:
            raise InputError(f"{path} cannot be read: {error}") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise InputError(f"{path} is not an evaluation record of format {FORMAT}, found {found!r}")
        return parse(cls, {**values, "ledger": rows}, str(path))


def _rows(ledger: Path) -> list[dict[str, str]]:
    if not ledger.is_file():
        return []
    with ledger.open(newline="") as file:
        return list(csv.DictReader(file))
