"""What a benchmark found, as it lies in JSON; whether a bar was reached is computed from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from robustfpd.config.schema import Config
from robustfpd.errors import InputError

FORMAT = 1


class Spread(Config):
    """Median and quartiles of several rounds."""

    median: float
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""
    count: int = 1
    """Rounds."""


class Bar(Config):
    """What a measure must reach; its median counts."""

    at_least: float | None = None
    at_most: float | None = None

    def missed_by(self, value: float) -> float:
        """By which fraction of the bar a value misses it; 0 where it is reached."""
        if self.at_most is not None and value > self.at_most:
            return value / self.at_most - 1 if self.at_most else value
        if self.at_least is not None and value < self.at_least:
            return 1 - value / self.at_least
        return 0.0


class Measure(Config):
    """One number that is looked at: a ratio, a share, rarely seconds."""

    what: str
    value: Spread
    unit: Literal["×", "%", "s", "points"] = "×"
    """× for ratios, % for shares of 1, points for differences of shares of 1."""
    bar: Bar | None = None
    """None where nothing is asked of it."""


class Entry(Config):
    """A contender, and what it reached."""

    name: str
    seconds: Spread | None = None
    """None where it did not run."""
    ratio: Spread | None = None
    """Its time over the reference's, round by round."""
    accuracy: float | None = None
    """Share of the images that its attack left standing, told by the same classifier for all."""
    forward: float | None = None
    """Passes forward per image."""
    backward: float | None = None
    """Passes backward per image."""
    missing: str = ""
    """Why it did not run."""


class Workload(Config):
    """One thing that several contenders did, interleaved."""

    group: str
    """Workloads of a group differ in `variant` only, and share a table."""
    variant: str = ""
    reference: str = ""
    """Whose time is 1."""
    entries: tuple[Entry, ...] = ()
    measures: tuple[Measure, ...] = ()
    notes: tuple[str, ...] = ()
    """What a reader must know of it."""


class Section(Config):
    """A part of the benchmark, where and how it ran."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    workloads: tuple[Workload, ...] = ()


class Benchmark(Config):
    """All that was measured on one kind of device."""

    format: Literal[1] = 1
    device: str
    """`cpu` or `cuda`."""
    sections: dict[str, Section] = Field(default_factory=dict)
    extra: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What scripts of benchmarks/ printed, by their names."""


def read(path: Path) -> Benchmark:
    """Read a benchmark's file; an InputError where it is none."""
    try:
        return Benchmark.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(
            f"{path} is no file of robustfpd benchmark ({where}: {error.errors()[0]['msg']}); measure it again"
        ) from None
