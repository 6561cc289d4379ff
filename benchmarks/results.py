"""Results of a benchmark as stored in JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from robustfpd.config import Config
from robustfpd.errors import InputError


class Quartiles(Config):
    """Median and quartiles over the rounds."""

    median: float
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""
    count: int = 1
    """Number of rounds."""


class Bar(Config):
    """Limits for the median of a measure."""

    at_least: float | None = None
    at_most: float | None = None

    def missed_by(self, value: float) -> float:
        """Return by which fraction of the bar `value` misses it; 0 where it is reached."""
        if self.at_most is not None and value > self.at_most:
            return value / self.at_most - 1 if self.at_most else value
        if self.at_least is not None and value < self.at_least:
            return 1 - value / self.at_least
        return 0.0


class Measure(Config):
    """One reported number: a ratio, a fraction or seconds."""

    what: str
    value: Quartiles
    unit: Literal["×", "%", "s", "points"] = "×"
    """× for ratios, % for fractions of 1, points for differences of fractions of 1."""
    bar: Bar | None = None
    """None where the number has no limit."""


class ImplementationResult(Config):
    """Time and result of one implementation of a workload."""

    name: str
    seconds: Quartiles | None = None
    """None where it did not run."""
    ratio: Quartiles | None = None
    """Its time over the reference's, taken in each round."""
    accuracy: float | None = None
    """Accuracy under its attack, computed by the same classifier for all."""
    forward: float | None = None
    """Forward passes per image."""
    backward: float | None = None
    """Backward passes per image."""
    missing: str = ""
    """Why it did not run."""


class Workload(Config):
    """One task that several implementations ran in turns."""

    group: str
    """Workloads of one group differ in `variant` only and share a table."""
    variant: str = ""
    reference: str = ""
    """The implementation whose time is 1."""
    entries: tuple[ImplementationResult, ...] = ()
    measures: tuple[Measure, ...] = ()
    notes: tuple[str, ...] = ()


class Section(Config):
    """One part of the benchmark with its environment and sizes."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    workloads: tuple[Workload, ...] = ()


class Benchmark(Config):
    """All sections measured on one type of device."""

    format: Literal[1] = 1
    device: str
    """`cpu` or `cuda`."""
    sections: dict[str, Section] = Field(default_factory=dict)


def read(path: Path) -> Benchmark:
    """Read a benchmark file.

    Raises:
        InputError: the file is not a benchmark.
    """
    try:
        return Benchmark.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(
            f"{path} is not a benchmark file ({where}: {error.errors()[0]['msg']}); measure again"
        ) from None
