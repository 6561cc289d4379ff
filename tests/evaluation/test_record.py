from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustfpd.errors import InputError, MissingDataError
from robustfpd.evaluation import EvaluationRecord, Proportion, evaluate

if TYPE_CHECKING:
    from tests.evaluation.conftest import Data, Linear


@pytest.fixture
def record(linear: Linear, data: Data) -> EvaluationRecord:
    return evaluate(
        linear, data, suite="first-look", eps=(0.01, 0.1 / 3), seed=4, every_attack=True, model_name='a, "b"\n'
    )


def test_wilson_interval_by_hand() -> None:
    # z = 1.959964; centre (k + z²/2)/(n + z²), half-width z/(n + z²)·sqrt(k(n-k)/n + z²/4)
    proportion = Proportion.of(8, 10)
    assert proportion.value == 0.8
    assert proportion.low == pytest.approx(0.49016, abs=5e-5)
    assert proportion.high == pytest.approx(0.94332, abs=5e-5)
    assert str(proportion) == "80.0 % [49.0, 94.3]"


@settings(deadline=None, derandomize=True, max_examples=60)
@given(total=st.integers(1, 20000), share=st.floats(0, 1))
def test_wilson_interval_in_closed_form(total: int, share: float) -> None:
    count = round(share * total)
    z = 1.959963984540054
    centre = (count + z * z / 2) / (total + z * z)
    half = z / (total + z * z) * math.sqrt(count * (total - count) / total + z * z / 4)
    proportion = Proportion.of(count, total)
    assert proportion.low == pytest.approx(max(0, centre - half), abs=1e-9)
    assert proportion.high == pytest.approx(min(1, centre + half), abs=1e-9)
    assert 0 <= proportion.low <= proportion.value <= proportion.high <= 1


def test_what_is_saved_is_what_is_loaded(record: EvaluationRecord, tmp_path: Path) -> None:
    path = record.save(tmp_path / "new" / "folder" / "linf.json")
    assert EvaluationRecord.load(path) == record
    assert sorted(p.name for p in path.parent.iterdir()) == ["linf.json", "linf.ledger.csv"]
    record.model_copy(update={"ledger": ()}).save(path)
    assert EvaluationRecord.load(path).ledger == ()


def test_the_files_say_what_they_hold(record: EvaluationRecord, tmp_path: Path) -> None:
    path = record.save(tmp_path / "linf.json")
    values = json.loads(path.read_text())
    assert values["format"] == 3
    assert values["clean"] == {"count": 50, "total": 60, "low": record.clean.low, "high": record.clean.high}
    assert [w["eps"] for w in values["worst_case"]] == [0.01, 0.1 / 3]
    assert "ledger" not in values
    with (tmp_path / "linf.ledger.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record.ledger) == 60 + sum(a.attacked for a in record.attacks)
    assert [row["attack"] for row in rows[:61]] == 60 * ["clean"] + ["FGSM"]
    assert [float(row["distance"]) for row in rows] == [row.distance for row in record.ledger]


def test_fractions_are_those_of_the_largest_radius(record: EvaluationRecord) -> None:
    assert record.num_images == 60
    assert record.clean_accuracy == 50 / 60
    assert record.worst_case[0].robust.value > record.worst_case[1].robust.value
    assert record.robust_accuracy == record.worst_case[1].robust.value


def test_a_missing_record_says_where_was_looked(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"no evaluation in .*none.json; run robustfpd evaluate first"):
        EvaluationRecord.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="no evaluation in"):
        EvaluationRecord.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.json cannot be read"),
        ('{"format": 1,', "r.json cannot be read"),
        ("[1, 2]", "r.json is not an evaluation record of format 3, found format 'list'"),
        ("{}", "r.json is not an evaluation record of format 3, found format None"),
        ('{"format": 2}', "r.json is not an evaluation record of format 3, found format 2"),
        ('{"format": 3}', "model_name: .*required.* in .*r.json"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        EvaluationRecord.load(path)


def test_files_that_are_no_text_are_refused(record: EvaluationRecord, tmp_path: Path) -> None:
    path = record.save(tmp_path / "r.json")
    (tmp_path / "r.ledger.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match=r"r.json cannot be read"):
        EvaluationRecord.load(path)
    path.write_bytes(b"\x80\x81")
    with pytest.raises(InputError, match=r"r.json cannot be read"):
        EvaluationRecord.load(path)


def test_a_damaged_field_is_named(record: EvaluationRecord, tmp_path: Path) -> None:
    path = record.save(tmp_path / "r.json")
    values = json.loads(path.read_text())
    for change, message in (
        ({"clean": {**values["clean"], "count": "many"}}, "clean.count: .*found 'many' in .*r.json"),
        ({"norm": "l7"}, "norm: .*found 'l7'"),
        ({"colour": "red"}, "unknown field 'colour'.*r.json"),
        ({"worst_case": None}, "worst_case: .*found None"),
    ):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(InputError, match=message):
            EvaluationRecord.load(path)


def test_an_unknown_field_deeper_down_is_named(record: EvaluationRecord, tmp_path: Path) -> None:
    path = record.save(tmp_path / "r.json")
    values = json.loads(path.read_text())
    values["worst_case"][0]["colour"] = "red"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"unknown field 'worst_case.0.colour'"):
        EvaluationRecord.load(path)


@pytest.mark.parametrize("junk", ["x", "\rx\r", 200_000 * "x"], ids=["letter", "line ends", "long"])
def test_a_damaged_ledger_is_refused(record: EvaluationRecord, tmp_path: Path, junk: str) -> None:
    path = record.save(tmp_path / "r.json")
    ledger = tmp_path / "r.ledger.csv"
    text = ledger.read_text()
    place = text.index(",", text.index("\n"))
    with ledger.open("w", newline="") as file:
        file.write(text[:place] + junk + text[place:])
    with pytest.raises(InputError):
        EvaluationRecord.load(path)
