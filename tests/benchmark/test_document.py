from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from robustfpd.benchmark.document import page, verdict
from robustfpd.benchmark.result import Bar, Benchmark, Entry, Measure, Section, Spread, Workload, read
from robustfpd.errors import InputError

TWO = Spread(median=2.0, low=1.5, high=2.5, count=5)


def _benchmark() -> Benchmark:
    workloads = tuple(
        Workload(
            group="PGD", variant=f"batch {batch}", reference="bare passes",
            entries=(
                Entry(name="foolbox", missing="not installed"),
                Entry(name="robustfpd", seconds=TWO, ratio=TWO, accuracy=0.25, forward=41, backward=40),
            ),
            measures=(Measure(what="ours / bare passes", value=TWO, bar=Bar(at_most=1.6)),),
        )
        for batch in (16, 64)
    )  # fmt: skip
    section = Section(environment={"processor": "abacus", "threads": 2}, settings={"rounds": 9, "limit": 60.0})
    own = [{"what": "two / one", "value": {"median": 1.8, "low": 1.8, "high": 1.8}, "bar": {"at_least": 1.7}}]
    return Benchmark(
        device="cpu", sections={"attacks": section.model_copy(update={"workloads": workloads})},
        extra={"two_processes": {"measures": own, "steps": 50}},
    )  # fmt: skip


@pytest.mark.parametrize(("bar", "unit", "said"), [
    (Bar(at_most=2.0), "×", "reached"), (Bar(at_most=1.6), "×", "missed by 25 %"),
    (Bar(at_least=2.5), "×", "missed by 20 %"), (Bar(at_least=1.9, at_most=2.1), "×", "reached"),
    (Bar(at_least=2.2, at_most=2.4), "×", "missed by 9 %"), (None, "×", ""),
    (Bar(at_most=0.0), "points", "missed by 200.0 points"),
    (Bar(at_most=1.999), "×", "missed by less than 1 %"),
])  # fmt: skip
def test_bars_are_computed(bar: Bar | None, unit: str, said: str) -> None:
    assert verdict(Measure(what="", value=TWO, unit=unit, bar=bar)) == said


def test_a_file_gives_the_page_that_its_benchmark_gave(tmp_path: Path) -> None:
    found = _benchmark()
    (tmp_path / "cpu.json").write_text(json.dumps(found.model_dump(mode="json", exclude_none=True)))
    assert read(tmp_path / "cpu.json") == found
    made = page([found])
    assert made == page([read(tmp_path / "cpu.json")])
    assert "| PGD, batch 16 | ours / bare passes | 2.00 [1.50, 2.50] | 5 | ≤ 1.60 | missed by 25 % |" in made
    assert "| contender | batch 16 | batch 64 |" in made
    told = "2.00 [1.50, 2.50]; 25.0 %; 41 + 40"
    rows = [f"| robustfpd | {told} | {told} |", "| foolbox | not installed | not installed |"]
    assert "\n".join(rows) in made
    assert "| two_processes | two / one | 1.80 | 1 | ≥ 1.70 | reached |" in made
    assert "| steps | 50 |" in made
    assert "abacus, 2 threads" in made


def test_a_file_that_is_no_benchmark_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="no file of robustfpd benchmark"):
        read(tmp_path / "other.json")


def test_the_page_of_the_documentation_is_that_of_its_files() -> None:
    root = Path(__file__).parents[2]
    kept = [read(path) for path in sorted((root / "results" / "benchmark").glob("*.json"))]
    written = (root / "docs" / "benchmarks.md").read_text()
    assert kept
    assert written == page(kept)
    assert re.search(r"reached|missed by", written)
