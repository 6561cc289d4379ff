from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from robustfpd.errors import InputError
from robustfpd.evaluation import EvaluationRecord, Proportion, Verdict
from robustfpd.evaluation.record import Check
from robustfpd.report.leaderboard import differences, leaderboard, read_entries, zoo_entries

MakeRecord = Callable[..., EvaluationRecord]
ROOT = Path(__file__).parents[2]
DESCRIPTION = {
    "title": "Tiny", "model": "digits/mini-fpd", "training": "PGD-AT, eps 0.2", "dataset": "digits",
    "images": "the test images", "data": {"dataset": "digits"}, "source": "us", "licence": "MIT",
}  # fmt: skip
BROKEN = Verdict.of((Check(name="masked", outcome="failed", evidence="evidence"),))


def write_entry(folder: Path, name: str, record: EvaluationRecord, **changes: Any) -> None:
    """Write an entry of a leaderboard."""
    (folder / name).mkdir(parents=True)
    (folder / name / "entry.yaml").write_text(yaml.safe_dump({**DESCRIPTION, **changes}))
    record.save_summary(folder / name / "record.json")


def test_the_tables_are_sorted_by_robust_accuracy_within_data_set_norm_and_radius(
    tmp_path: Path, make_record: MakeRecord
) -> None:
    write_entry(tmp_path, "a", make_record("a", suite="standard", robust=(100,)), title="Weak")
    write_entry(tmp_path, "b", make_record("b", suite="standard", robust=(160,)), title="Strong")
    write_entry(tmp_path, "c", make_record("c", suite="standard", robust=(170, 10)), title="Two radii")
    write_entry(tmp_path, "d", make_record("d", suite="autoattack", robust=(10,)), title="Other data", dataset="mnist")
    lines = list(leaderboard(read_entries(tmp_path)))
    headings = [line for line in lines if line.startswith("## ")]
    assert headings == ["## digits, L∞, eps 0.1", "## digits, L∞, eps 0.2", "## mnist, L∞, eps 0.1"]
    order = [line.split("|")[1].strip() for line in lines if line.startswith("|") and "---" not in line]
    assert order == ["network", "Two radii", "Strong", "Weak", "network", "Two radii", "network", "Other data"]
    strong = next(line for line in lines if "Strong" in line)
    assert "| 95.0 [91.0, 97.3] | 80.0 [73.9, 85.0] | 200 of the test images | `standard` | us |" in strong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "quick"}, "its suite is quick; use one of standard, full"),
        (
            {"verdict": Verdict.of((Check(name="masked", outcome="failed", evidence="evidence"),))},
            "its verdict is broken, not trusted",
        ),
    ],
)
def test_a_record_that_cannot_be_relied_on_is_refused(
    tmp_path: Path, make_record: MakeRecord, changes: dict[str, Any], message: str
) -> None:
    write_entry(tmp_path, "a", make_record("a", **{"suite": "standard", **changes}))
    with pytest.raises(InputError, match=f"record.json is not accepted: {message}"):
        read_entries(tmp_path)


def test_an_incomplete_entry_is_refused_by_name(tmp_path: Path, make_record: MakeRecord) -> None:
    write_entry(tmp_path, "a", make_record("a", suite="standard"), licens="MIT")
    with pytest.raises(InputError, match="licens"):
        read_entries(tmp_path)
    (tmp_path / "a" / "record.json").unlink()
    with pytest.raises(InputError, match=r"lacks record\.json; an entry is entry\.yaml and record\.json"):
        read_entries(tmp_path)


def test_a_fresh_evaluation_must_lie_within_the_committed_intervals(make_record: MakeRecord) -> None:
    old = make_record("a", suite="standard", robust=(150, 60))
    assert differences(old, old) == []
    assert differences(old, make_record("a", robust=(148, 62), clean=189)) == []
    (found,) = differences(old, make_record("a", robust=(150, 80)))
    assert found == "robust at eps 0.2: 30.0 % [24.1, 36.7] in the record, 40.0 % [33.5, 46.9] now"
    (found,) = differences(old, make_record("a", clean=200))
    assert found.startswith("clean: 95.0 %")
    (found,) = differences(old, make_record("a", robust=(150,)))
    assert found == "eps 0.2 is not evaluated"
    (found,) = differences(old, make_record("a", data_sha256="f" * 64))
    assert "other images" in found
    assert "the verdict is now broken" in differences(old, make_record("a", verdict=BROKEN))[0]


def test_the_zoo_is_on_the_leaderboard_with_the_records_of_the_manifest() -> None:
    entries = zoo_entries(ROOT / "models")
    assert {"digits/mini-fpd", "mnist/mini-baseline"} <= {entry.name for entry in entries}
    for entry in entries:
        assert entry.record.model_name == entry.name
        assert entry.record.verdict.status == "trusted"
        assert f"`{entry.name}`" in "\n".join(leaderboard(entries))
        assert isinstance(entry.record.clean, Proportion)
