"""EvaluationRecord: the result of an evaluation with its verdict, to JSON and back."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import computed_field, model_validator

from robustfpd.config import Config, Norm, parse
from robustfpd.errors import InputError, MissingDataError
from robustfpd.evaluation.ledger import CLEAN, LedgerRow, read_rows, write_rows
from robustfpd.evaluation.robustness import Robustness, best_published, guessing_accuracy, level
from robustfpd.io import write_json, writing

FORMAT = 3
DERIVED = ("headline", "robustness")
"""Properties that are written to the JSON for its readers, and not read back."""
LEDGER = ".ledger.csv"
CheckOutcome = Literal["passed", "suspicious", "failed", "skipped"]
Status = Literal["trusted", "suspect", "broken"]


class Check(Config):
    """Result of one check of an evaluation or of the doctor; `docs/checks.md` explains each by name."""

    name: str
    outcome: CheckOutcome
    """`suspicious`: a stronger attack would probably find more, or the result may mislead; `failed`: the result is
    meaningless; `skipped`: there is nothing to measure, or another check must pass first."""
    evidence: str
    """What was measured, in words and numbers."""
    fix: str = ""
    """What to do, with the code to write; empty unless suspicious or failed."""
    values: Mapping[str, float] = {}
    """The measured numbers by name."""


class Verdict(Config):
    """Answer to "is the measurement reliable?", from all checks of an evaluation."""

    status: Status
    """`broken` if a check failed, `suspect` if one is suspicious, `trusted` otherwise."""
    reasons: tuple[str, ...] = ()
    """Evidence of the checks that failed, then of those that are suspicious."""
    checks: tuple[Check, ...] = ()

    @classmethod
    def of(cls, checks: Sequence[Check]) -> Verdict:
        """Return the verdict that follows from `checks`."""
        failed = [c for c in checks if c.outcome == "failed"]
        suspicious = [c for c in checks if c.outcome == "suspicious"]
        status: Status = "broken" if failed else "suspect" if suspicious else "trusted"
        reasons = tuple(f"{c.name}: {c.evidence}" for c in (*failed, *suspicious))
        return cls(status=status, reasons=reasons, checks=tuple(checks))


class Proportion(Config):
    """A count of images, with the 95 % Wilson interval of the fraction."""

    count: int
    total: int
    low: float
    high: float

    @classmethod
    def of(cls, count: int, total: int) -> Proportion:
        """Return `count` of `total` images with the interval."""
        from scipy.stats import binomtest

        interval = binomtest(count, total).proportion_ci(confidence_level=0.95, method="wilson")
        return cls(count=count, total=total, low=float(interval.low), high=float(interval.high))

    @property
    def value(self) -> float:
        """The fraction count / total."""
        return self.count / self.total

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


class AttackResult(Config):
    """Result of one attack at one radius."""

    attack: str
    eps: float
    attacked: int
    """Images that it was run on: the survivors, or all correctly classified images."""
    misclassified: int
    """Images for which it found an adversarial example."""
    accuracy: Proportion | None = None
    """Accuracy under this attack alone; None unless it was run on all correctly classified images."""
    seconds: float
    failed: int = 0
    """Images for which it raised an error or left its ball."""
    skipped: int = 0
    """Survivors that it was not run on: others have larger margins."""
    not_attacked: int = 0
    """Survivors that it was not run on when the evaluation ended early."""
    forward_passes: int = 0
    backward_passes: int = 0
    median_queries: float | None = None
    """Per misclassified image, of attacks without gradients; None if there is none."""
    median_distance: float | None = None
    """Norm of the perturbations of minimal attacks; None if they found none."""


class WorstCase(Config):
    """Images that survive every attack at a radius and at all smaller ones."""

    eps: float
    robust: Proportion
    audited: int = 0
    """Survivors drawn at random on which every attack of the suite was run; 0 if it was run on all of them."""
    missed_at_most: int = 0
    """Survivors that may have an adversarial example although none of the audited ones has (95 % confidence)."""

    @model_validator(mode="before")
    @classmethod
    def _drop_derived(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if k != "interval"} if isinstance(values, dict) else values

    @computed_field  # type: ignore[prop-decorator]  # mypy knows no decorators of properties
    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the robust accuracy, with the lower end that of `missed_at_most` fewer survivors."""
        low = Proportion.of(max(self.robust.count - self.missed_at_most, 0), self.robust.total).low
        return low, self.robust.high


class EvaluationRecord(Config):
    """The result of an evaluation. Fractions are of all images, those misclassified without an attack included."""

    format: int = FORMAT
    model_name: str
    """The classifier's name."""
    suite: str
    norm: Norm
    seed: int
    batch_size: int
    """Images per forward pass at the end: the batch size is halved when memory runs out."""
    batch_size_auto: bool
    """The batch size was chosen automatically."""
    search_precision: Literal["fp32", "bf16"]
    """Precision in which attacks differentiated the classifier; adversarial images are classified in float32."""
    every_attack: bool
    clean: Proportion
    worst_case: tuple[WorstCase, ...]
    attacks: tuple[AttackResult, ...]
    ledger: tuple[LedgerRow, ...] = ()
    data_sha256: str
    """SHA-256 of the images as 8-bit pixels, and the labels."""
    weights_sha256: str | None = None
    """SHA-256 of the classifier's weights; None if they cannot be read as bytes."""
    environment: dict[str, Any]
    verdict: Verdict
    """Whether the robust accuracy can be trusted; `robustness` answers whether the model is robust."""
    check_forward_passes: int = 0
    """Images that went forward for checks and preparation."""
    check_backward_passes: int = 0
    surrogates: tuple[str, ...] = ()
    """Names of the classifiers that transferred attacks were made on."""
    class_names: tuple[str, ...] = ()
    """Names of the K classes; empty if unknown."""
    settings_sha256: str
    """SHA-256 of all settings that decide the result."""
    complete: bool = True
    """False if the evaluation ended early: `worst_case` are upper bounds, the check `complete` says what is left out,
    and repeating the evaluation goes on where it ended."""
    dataset: str = ""
    """Name of the data set whose test images these are, for the best published number; empty if unknown."""
    guessing: float | None = None
    """Accuracy of guessing, 1/K or the share of the most frequent label, whichever is larger; None in older records."""
    certified_accuracy: tuple[float, ...] = ()
    """Certified accuracy by radius, a fraction, as given to `evaluate`; empty without one."""

    @model_validator(mode="before")
    @classmethod
    def _drop_derived(cls, values: Any) -> Any:
        return {k: v for k, v in values.items() if k not in DERIVED} if isinstance(values, dict) else values

    @property
    def forward_passes(self) -> int:
        """Images that went forward through the classifier and its views, including checks and clean images."""
        return sum(row.queries for row in self.ledger) + self.check_forward_passes

    @property
    def backward_passes(self) -> int:
        """Images whose gradient was computed, including checks."""
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
    def under_attack(self) -> tuple[WorstCase, ...]:
        """The worst cases at radii above 0; at 0 it is `clean`."""
        return tuple(worst for worst in self.worst_case if worst.eps > 0)

    @property
    def robust_accuracy(self) -> float:
        """Fraction of images that survive every attack at the largest radius; see `worst_case` for other radii."""
        return self.worst_case[-1].robust.value

    @property
    def robustness(self) -> Robustness:
        """Answer to "is the model robust?" at the largest radius."""
        worst, clean, guessing = self.worst_case[-1], self.clean, self.guessing
        if guessing is None:
            labels = [row.label for row in self.ledger if row.attack == CLEAN]
            guessing = guessing_accuracy(labels, len(self.class_names))
        reached = level(
            robust=worst.robust.value, low=worst.interval[0], clean=clean.value, images=clean.total, eps=worst.eps,
            guessing=guessing, status=self.verdict.status,
        )  # fmt: skip
        return Robustness(
            level=reached, norm=self.norm, eps=worst.eps, accuracy=worst.robust.value, clean_accuracy=clean.value,
            guessing=guessing, published=best_published(self.dataset, self.norm, worst.eps),
        )  # fmt: skip

    @property
    def headline(self) -> str:
        """Both answers in sentences: is the model robust, and is the measurement reliable?"""
        reason = next(iter(self.verdict.reasons), None)
        return self.robustness.headline(reason and reason.split(";")[0])

    def save(self, path: Path) -> Path:
        """Write JSON, and the ledger as CSV beside it; return the JSON's path."""
        with writing(path):
            write_rows(path.with_suffix(LEDGER), self.ledger)
        return self.save_summary(path)

    def save_summary(self, path: Path) -> Path:
        """Write the JSON without the ledger; return its path."""
        derived = {"headline": self.headline, "robustness": self.robustness.model_dump(mode="json")}
        with writing(path):
            write_json(path, {**derived, **self.model_dump(mode="json", exclude={"ledger"})})
        return path

    @classmethod
    def load(cls, path: Path) -> EvaluationRecord:
        """Read a record and its ledger; a missing or damaged file is an InputError."""
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
