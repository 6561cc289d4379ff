from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from robustfpd.cli import main
from robustfpd.evaluation import EvaluationRecord


@pytest.fixture
def runs(fpd_run: Path, baseline_run: Path, tmp_path: Path) -> Path:
    """Two runs as training and evaluation leave them: a network and its undefended baseline."""
    shutil.copytree(fpd_run, tmp_path / "runs" / "mine")
    shutil.copytree(baseline_run, tmp_path / "runs" / "mine-baseline")
    return tmp_path / "runs"


def test_one_run_is_reported_with_its_baseline_beside_it(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(runs / "mine")])
    said = capsys.readouterr().out
    page = runs / "mine" / "report.html"
    assert f"report: {page}, also as report.csv" in said
    record = EvaluationRecord.load(runs / "mine" / "evaluation" / "first.json")
    assert record.headline in said
    assert f"Is the measurement reliable? {record.verdict.status} (" in said
    text = page.read_text(encoding="utf-8")
    assert "mine-baseline" in text
    assert "Settings that differ" in text
    assert (runs / "mine" / "report.csv").is_file()
    assert "no evaluation" not in said


def test_a_baseline_that_was_not_evaluated_alike_is_left_out(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(runs / "mine-baseline" / "evaluation")
    main(["report", str(runs / "mine")])
    assert "mine-baseline" not in capsys.readouterr().out
    assert "Settings that differ" not in (runs / "mine" / "report.html").read_text(encoding="utf-8")


def test_several_runs_are_compared_in_the_first_one_s_folder(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(runs / "mine-baseline"), str(runs / "mine"), "--title", "Which?"])
    assert f"report: {runs / 'mine-baseline' / 'comparison.html'}" in capsys.readouterr().out
    assert "<h1>Which?</h1>" in (runs / "mine-baseline" / "comparison.html").read_text(encoding="utf-8")


def test_json_has_the_files_and_the_numbers(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(runs / "mine"), "--out", str(tmp_path / "x" / "page.html"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [Path(f).name for f in found["files"]] == ["page.html", "page.csv"]
    assert all(Path(f).is_file() for f in found["files"])
    record = EvaluationRecord.load(runs / "mine" / "evaluation" / "first.json")
    assert found["runs"][0]["clean_accuracy"] == record.clean_accuracy
    assert list(found["runs"][0]["robust_accuracy"].values()) == [w.robust.value for w in record.worst_case]
    assert found["runs"][0]["headline"] == record.headline
    assert found["runs"][0]["robustness"]["baseline"]["name"] == found["runs"][1]["name"]
    assert found["runs"][1]["robustness"]["baseline"] is None
    main(["report", str(runs / "mine"), "--quiet"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report"], "name a run to report on|needs RUNS"),
        (["report", "runs/nope"], "no run, model or evaluation 'runs/nope'"),
        (["report", "digits/mini-fpd", "--out", "page.pdf"], r"must be an \.html file"),
        (["report", "digits/mini-fpd", "--suite", "quik"], "did you mean 'quick'"),
    ],
)
def test_what_cannot_be_reported_is_an_error(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr()[1])
    assert list(tmp_path.iterdir()) == []
