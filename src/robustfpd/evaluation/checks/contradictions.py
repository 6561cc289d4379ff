"""The check `contradictions`: compares a record with others of the same weights and images, and with a certificate."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robustfpd.config import parse
from robustfpd.errors import InputError
from robustfpd.evaluation.checks.context import is_random, judge, skipped
from robustfpd.evaluation.ledger import CLEAN, is_unfinished
from robustfpd.evaluation.record import Check, CheckOutcome, EvaluationRecord, Proportion, Verdict
from robustfpd.evaluation.robustness import NORM_NAMES, format_eps
from robustfpd.evaluation.suites import STRENGTH

NAME = "contradictions"
SAME = ("format", "weights_sha256", "data_sha256", "norm")
"""Fields that are equal in records that can be compared."""
NOT_RANKED = ("published", "published-mnist", "autoattack", "autoattack-rand", "autoattack-plus")
"""Suites that repeat their authors' attacks, without adaptive ones: those of `quick` are stronger on some networks."""
ROUNDING = 1
"""Images of which the clean prediction may differ between devices and batch sizes."""
MISSED = 0.002
"""Share of the images that `standard` may leave above AutoAttack: it attacks most survivors with fewer passes."""
Named = Sequence[tuple[str, EvaluationRecord]]


@dataclass(frozen=True)
class _Result:
    """The robust accuracy of one record at one radius."""

    record: EvaluationRecord
    place: str
    """How the evidence names the record."""
    eps: float
    robust: Proportion

    def __str__(self) -> str:
        radius = f"{NORM_NAMES[self.record.norm]} {format_eps(self.eps)}"
        return f"{self.robust} at {radius} under {self.record.suite} ({self.place})"

    def survivors(self) -> set[int]:
        """Return the positions of the robust images in the data; other records may number the same images otherwise."""
        clean = [row for row in self.record.ledger if row.attack == CLEAN]
        attacked = (row for row in self.record.ledger if row.attack != CLEAN and row.outcome == "misclassified")
        lost = {row.image for row in attacked if row.eps <= self.eps or math.isclose(row.eps, self.eps)}
        return {i for i, row in enumerate(clean) if row.clean_prediction == row.label and row.image not in lost}

    def missed(self, other: _Result) -> int:
        """Return how many images are robust here and not in `other`; 0 without ledgers."""
        if not self.record.ledger or not other.record.ledger:
            return 0
        return len(self.survivors() - other.survivors())


def comparable(record: EvaluationRecord, others: Named) -> Named:
    """Return the others that evaluate the same weights on the same images in the same norm, to their end."""
    if record.weights_sha256 is None:
        return []
    same = [(name, o) for name, o in others if all(getattr(o, field) == getattr(record, field) for field in SAME)]
    return [(name, other) for name, other in same if record.complete and other.complete]


def read_beside(record: EvaluationRecord, path: Path) -> Named:
    """Return the other records in the folder of `path` that can be compared with `record`; other files are ignored."""
    found = []
    for file in sorted(path.parent.glob("*.json")):
        if file != path and not is_unfinished(file) and record.weights_sha256 is not None:
            other = _read(file, {field: getattr(record, field) for field in SAME})
            found += [] if other is None else [(file.stem, other)]
    return found


def judged(record: EvaluationRecord, others: Named) -> EvaluationRecord:
    """Return the record with this check, made again, in its verdict."""
    check = contradictions(record, others)
    checks = [check if c.name == NAME else c for c in record.verdict.checks]
    checks += [] if check in checks else [check]
    return record.model_copy(update={"verdict": Verdict.of(checks)})


def contradictions(record: EvaluationRecord, others: Named) -> Check:
    """Check that other records of the same weights and a certified accuracy agree with a record."""
    known = comparable(record, others)
    if not known and not record.certified_accuracy:
        return skipped(NAME, "no other record of these weights and images, and no certified accuracy")
    failed, suspicious = [*_below_certified(record)], list[str]()
    for name, other in known:
        random = is_random(record.verdict.checks) or is_random(other.verdict.checks)
        failed += _clean(record, name, other, random)
        above = list(_above(record, name, other, random))
        failed += above
        suspicious += [] if above or random else _missed(record, name, other)
    if failed or suspicious:
        outcome: CheckOutcome = "failed" if failed else "suspicious"
        return judge(NAME, True, "; ".join([*failed, *suspicious]), "", outcome, found=len(failed) + len(suspicious))
    compared = [name for name, _ in known] + (["the certified accuracy"] if record.certified_accuracy else [])
    return judge(NAME, False, f"agrees with {', '.join(compared)}", found=0)


def _below_certified(record: EvaluationRecord) -> Iterator[str]:
    """Yield the radii at which the interval of the robust accuracy lies below the certified accuracy."""
    if not record.certified_accuracy:
        return
    for worst, certified in zip(record.worst_case, record.certified_accuracy, strict=True):
        if worst.robust.high < certified:
            radius = f"{NORM_NAMES[record.norm]} {format_eps(worst.eps)}"
            yield f"{worst.robust} at {radius} is below the certified accuracy, {100 * certified:.1f} %"


def _clean(record: EvaluationRecord, name: str, other: EvaluationRecord, random: bool) -> Iterator[str]:
    ours, theirs = record.clean, other.clean
    if _exceeds(ours, theirs, random, ROUNDING) or _exceeds(theirs, ours, random, ROUNDING):
        yield f"clean accuracy is {ours} here and {theirs} in {name}, on the same weights and images"


def _above(record: EvaluationRecord, name: str, other: EvaluationRecord, random: bool) -> Iterator[str]:
    """Yield the pair of robust accuracies that contradict each other most, if any."""
    pairs = [(a.robust.count - b.robust.count, a, b) for a, b in _ordered(record, name, other)]
    # A weaker attack that leaves more at a larger radius does not discredit the stronger one's record.
    pairs = [(gap, a, b) for gap, a, b in pairs if a.record is record or (_as_strong(a, b) and not _includes(a, b))]
    pairs = [(gap, a, b) for gap, a, b in pairs if _exceeds(a.robust, b.robust, random, _tolerated(a, b))]
    if pairs:
        _, high, low = max(pairs, key=lambda pair: pair[0])
        missed = high.missed(low)
        images = f"; images robust in the first and misclassified in the second: {missed}" if missed else ""
        yield f"{high} is above {low}{images}"


def _missed(record: EvaluationRecord, name: str, other: EvaluationRecord) -> Iterator[str]:
    """Yield where images are robust here, though an attack that is no stronger misclassified them."""
    pairs = [(a, b) for a, b in _ordered(record, name, other) if a.record is record and _as_strong(a, b)]
    missed, *places = max(((a.missed(b), a, b) for a, b in pairs), key=lambda entry: entry[0], default=(0,))
    if missed:
        first, second = places
        yield f"{first} and {second}: images robust in the first and misclassified in the second: {missed}"


def _ordered(record: EvaluationRecord, name: str, other: EvaluationRecord) -> Iterator[tuple[_Result, _Result]]:
    """Yield pairs whose first must not exceed the second: a larger radius, or a stronger suite at an equal radius."""
    ours = [_Result(record, "this record", w.eps, w.robust) for w in record.worst_case]
    theirs = [_Result(other, name, w.eps, w.robust) for w in other.worst_case]
    for a, b in itertools.product(ours, theirs):
        if math.isclose(a.eps, b.eps):
            yield from ((x, y) for x, y in ((a, b), (b, a)) if _rank(x) < _rank(y) or _includes(x, y))
        else:
            yield (a, b) if a.eps > b.eps else (b, a)


def _includes(a: _Result, b: _Result) -> bool:
    """Return whether a suite has all attacks of the other, which is AutoAttack: it must not leave more images."""
    return a.record.suite in ("standard", "full") and b.record.suite.startswith("autoattack")


def _tolerated(a: _Result, b: _Result) -> float:
    return max(1, MISSED * a.robust.total) if _includes(a, b) and math.isclose(a.eps, b.eps) else 0


def _rank(result: _Result) -> float:
    """Return the place of a suite in STRENGTH, the strongest first; NaN, which compares with nothing, if unknown."""
    suite = result.record.suite
    return STRENGTH.index(suite) if suite in STRENGTH and suite not in NOT_RANKED else math.nan


def _as_strong(a: _Result, b: _Result) -> bool:
    return a.record.suite == b.record.suite or _rank(a) <= _rank(b) or _includes(a, b)


def _exceeds(a: Proportion, b: Proportion, random: bool, tolerated: float = 0) -> bool:
    """Return whether `a` is larger by more images than tolerated; with random outputs, whether intervals are apart."""
    return a.low > b.high if random else a.count > b.count + tolerated


def _read(path: Path, required: dict[str, Any]) -> EvaluationRecord | None:
    """Return a record with these fields, without its ledger where that is damaged; None for other files."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or any(values.get(k) != v for k, v in required.items()):
            return None
        try:
            return EvaluationRecord.load(path)
        except InputError:
            return parse(EvaluationRecord, values, str(path))
    except (OSError, ValueError):
        return None
