"""What an evaluation found, as JSON and back."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Literal

from robustfpd.config import Config, Norm, parse
from robustfpd.errors import InputError, MissingDataError
from robustfpd.evaluation.ledger import LedgerRow, read_rows, write_rows, writing
from robustfpd.evaluation.verdict import Verdict
from robustfpd.io import write_json

FORMAT = 3
LEDGER = ".ledger.csv"


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
    """Images it was tried on: those that still stood, or all that were classified correctly."""
    misclassified: int
    """Of these, images it turned."""
    accuracy: Proportion | None = None
    """Accuracy under this attack alone; known only when it was tried on all images."""
    seconds: float
    failed: int = 0
    """Images for which it raised an error or left its ball: it says nothing about these."""
    skipped: int = 0
    """Images that still stood but were left out: no closer one had fallen to it."""
    forward_passes: int = 0
    backward_passes: int = 0
    median_queries: float | None = None
    """Forward passes until an image fell, for attacks that see no gradients; None where none fell."""
    median_distance: float | None = None
    """Norm of the smallest perturbations, for attacks that look for these; None where they found none."""


class WorstCase(Config):
    """Images that robust every attack at a radius and at all smaller ones."""

    eps: float
    robust: Proportion


class EvaluationRecord(Config):
    """The result of an evaluation; fractions are of all images, misclassified ones included."""

    format: int = FORMAT
    model_name: str
    """What the classifier is called."""
    suite: str
    norm: Norm
    seed: int
    batch_size: int
    """Images that went through the classifier at once, at the least: it is halved where memory does not suffice."""
    batch_size_auto: bool
    """The batch size was chosen automatically."""
    search_precision: Literal["fp32", "bf16"]
    """What attacks differentiated the classifier in; what they found was judged in float32."""
    every_attack: bool
    clean: Proportion
    worst_case: tuple[WorstCase, ...]
    attacks: tuple[AttackResult, ...]
    ledger: tuple[LedgerRow, ...] = ()
    data_sha256: str
    """Of the images as 8-bit pixels, and the labels."""
    weights_sha256: str | None = None
    """Of the classifier's weights; None where they cannot be read as bytes."""
    environment: dict[str, Any]
    verdict: Verdict
    """Whether the number can be trusted."""
    check_forward_passes: int = 0
    """Images that the checks sent forward; those of the attacks are told with these."""
    check_backward_passes: int = 0
    surrogates: tuple[str, ...] = ()
    """Networks that transferred attacks were made on."""
    class_names: tuple[str, ...] = ()
    """Of the K classes; empty where nobody told them."""
    settings_sha256: str
    """Of all settings that decide the result."""

    @property
    def forward_passes(self) -> int:
        """Images that went forward through the classifier and its views, checks and clean predictions included."""
        return sum(row.queries for row in self.ledger) + self.check_forward_passes

    @property
    def backward_passes(self) -> int:
        """Images whose gradient was asked for."""
        return sum(row.gradients for row in self.ledger) + self.check_backward_passes

    @property
    def num_images(self) -> int:
        """Number of images."""
        return self.clean.total

    @property
    def clean_accuracy(self) -> float:
        """Fraction of images classified correctly without an attack."""
        return self.clean.value

    @property
    def robust_accuracy(self) -> float:
        """Fraction that robust every attack at the largest radius; see `worst_case` for the others."""
        return self.worst_case[-1].robust.value

    def save(self, path: Path) -> Path:
        """Write JSON, and the ledger as CSV beside it; return the JSON's path."""
        with writing(path):
            write_rows(path.with_suffix(LEDGER), self.ledger)
            write_json(path, self.model_dump(mode="json", exclude={"ledger"}))
        return path

    @classmethod
    def load(cls, path: Path) -> EvaluationRecord:
        """Read what `save` wrote; a missing or damaged file is an InputError."""
        if not path.is_file():
            raise MissingDataError(f"no evaluation in {path.absolute()}; run robustfpd evaluate first")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            ledger = path.with_suffix(LEDGER)
            rows = read_rows(ledger) if ledger.is_file() else []
        except InputError:
            raise
        except (ValueError, OSError, csv.Error) as error:
            raise InputError(f"{path} cannot be read: {error}; delete it and repeat the evaluation") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise InputError(
                f"{path} is not an evaluation record of format {FORMAT}, found format {found!r}; repeat the evaluation"
            )
        return parse(cls, {**values, "ledger": rows}, str(path))
