from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.page import bar_result, page
from benchmarks.results import Bar, Benchmark, ImplementationResult, Measure, Quartiles, Section, Workload, read
from robustfpd.errors import InputError

TWO = Quartiles(median=2.0, low=1.5, high=2.5, count=5)


def _benchmark() -> Benchmark:
    workloads = tuple(
        Workload(
            group="PGD", variant=f"batch {batch}", reference="bare passes",
            entries=(
                ImplementationResult(name="foolbox", missing="not installed"),
                ImplementationResult(name="robustfpd", seconds=TWO, ratio=TWO, accuracy=0.25, forward=41, backward=40),
            ),
            measures=(Measure(what="ours / bare passes", value=TWO, bar=Bar(at_most=1.6)),),
        )
        for batch in (16, 64)
    )  # fmt: skip
    section = Section(environment={"processor": "abacus", "threads": 2}, settings={"rounds": 9, "limit": 60.0})
    return Benchmark(device="cpu", sections={"attacks": section.model_copy(update={"workloads": workloads})})


@pytest.mark.parametrize(("bar", "unit", "text"), [
    (Bar(at_most=2.0), "×", "reached"), (Bar(at_most=1.6), "×", "missed by 25 %"),
    (Bar(at_least=2.5), "×", "missed by 20 %"), (Bar(at_least=1.9, at_most=2.1), "×", "reached"),
    (Bar(at_least=2.2, at_most=2.4), "×", "missed by 9 %"), (None, "×", ""),
    (Bar(at_most=0.0), "points", "missed by 200.0 points"),
    (Bar(at_most=1.999), "×", "missed by less than 1 %"),
])  # fmt: skip
def test_bars_are_computed(bar: Bar | None, unit: str, text: str) -> None:
    assert bar_result(Measure(what="", value=TWO, unit=unit, bar=bar)) == text


def test_a_file_gives_the_page_that_its_benchmark_gave(tmp_path: Path) -> None:
    benchmark = _benchmark()
    (tmp_path / "cpu.json").write_text(json.dumps(benchmark.model_dump(mode="json", exclude_none=True)))
    assert read(tmp_path / "cpu.json") == benchmark
    text = page([benchmark])
    assert text == page([read(tmp_path / "cpu.json")])
    assert "| PGD, batch 16 | ours / bare passes | 2.00 [1.50, 2.50] | 5 | ≤ 1.60 | missed by 25 % |" in text
    assert "| implementation | batch 16 | batch 64 |" in text
    cell = "2.00 [1.50, 2.50]; 25.0 %; 41 + 40"
    assert f"| robustfpd | {cell} | {cell} |\n| foolbox | not installed | not installed |" in text
    assert "abacus, 2 threads" in text


def test_a_file_that_is_not_a_benchmark_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"format": 2}')
    with pytest.raises(InputError, match="not a benchmark file"):
        read(tmp_path / "other.json")


def test_the_documentation_page_is_that_of_the_stored_results() -> None:
    root = Path(__file__).parents[2]
    benchmarks = [read(path) for path in sorted((root / "results" / "benchmark").glob("*.json"))]
    text = (root / "docs" / "benchmarks.md").read_text()
    assert benchmarks
    assert text == page(benchmarks)
    assert re.search(r"reached|missed by", text)
