from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from robustfpd.cli import main
from robustfpd.evaluation import EvaluationRecord

FAST = ["training.epochs=2", "data.train_limit=128", "model.pyramid_channels=4"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    main([*words, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_dry_run_of_train_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alike = ["training.restoration_start=0", "training.second_pass_interval=1"]
    words = ["train", "digits/mini", *FAST, *alike, "--stages", "two-phase,adversarial", "--dry-run"]
    main(words)
    out = capsys.readouterr().out
    for said in ("stage two-phase, into runs/digits-mini\n", "stage adversarial, into runs/digits-mini/adversarial",
                 "128 to train, 143 to validate, 359 to test", "2 of batches of 32", "ms a batch timed now on cpu",
                 "noise     0.2, 0.2 between the passes\n",
                 "gate      shut above a restoration loss of 0.5 times a constant image's\n",
                 "nothing was trained or written"):  # fmt: skip
        assert said in out
    assert max(map(len, out.splitlines())) <= 80
    result = _json(capsys, *words)
    assert [s["stage"] for s in result["stages"]] == ["two-phase", "adversarial"]
    for stage in result["stages"]:  # 4 batches an epoch, and validation
        assert stage["estimated_seconds"] + 0.05 > 0.9 * 2 * 4 * stage["seconds_per_batch"] > 0  # rounded to 0.1 s
    assert result["stages"][1]["seconds_per_batch"] > result["stages"][0]["seconds_per_batch"]
    assert result["settings"]["training"]["epochs"] == 2
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_evaluate_estimates_its_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = _json(capsys, "train", "digits/mini", *FAST, "model.head=tanh")
    assert trained["stages"][0] | {"validation_accuracy": 0, "best_epoch": 0} == {
        "stage": "two-phase", "folder": "runs/digits-mini", "epochs": 2, "stopped_early": False, "best_epoch": 0,
        "validation_accuracy": 0, "validation_robust_accuracy": None,
    }  # fmt: skip
    run = trained["stages"][0]["folder"]
    words = ["evaluate", run, "--num-images", "6", "--suite", "first-look", "--eps", "0.001", "0.002"]
    before = sorted(tmp_path.rglob("*"))
    main([*words, "--dry-run"])
    out = capsys.readouterr().out
    assert "6 of 359 test images of digits" in out
    assert "PGD-40, pre-squash" in out
    assert "dry run: 6 images were attacked, nothing was written" in out
    assert max(map(len, out.splitlines())) <= 80
    planned = _json(capsys, *words, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before
    main([*words, "--quiet"])
    assert capsys.readouterr().out == ""
    found = _json(capsys, *words)
    record = EvaluationRecord.load(Path(found["path"]))
    assert found["path"] == planned["path"]
    assert found["worst_case"][1]["accuracy"] == record.robust_accuracy
    assert found["verdict"]["status"] == record.verdict.status
    assert planned["estimated_seconds"] > 0
    assert planned["estimated_forward_passes"] == pytest.approx(record.forward_passes, rel=0.02)
    assert planned["estimated_backward_passes"] == record.backward_passes  # of the same six images
    assert (planned["attacked"], planned["not_reached"]) == (6, [])
    for attack in planned["attacks"]:  # and a forward pass for the prediction, of the pre-tanh logits as well
        rows = [row for row in record.ledger if row.attack == attack["label"]]
        assert max(row.queries for row in rows) <= attack["iterations_per_image"] + 2
        assert max(row.gradients for row in rows) <= attack["iterations_per_image"]
        assert len(rows) == attack["estimated_images"]
    assert list(dict.fromkeys(a.attack for a in record.attacks)) == [a["label"] for a in planned["attacks"]]
    main(words)
    assert f"next: robustfpd report {run}" in capsys.readouterr().out


def test_a_dry_run_reports_wrong_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["train", "mnist/mini", "--data-root", str(tmp_path), "--download"], "MNIST"),
        (["train", "digits/mini", "model.backbone=resnet_18"], "unknown backbone 'resnet_18'; did you mean"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--dry-run"])
        assert ended.value.code == 2
        assert said in capsys.readouterr()[1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["recipes", "datasets", "models"])
def test_lists_are_printed_as_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = _json(capsys, name)[name]
    assert {"digits/mini", "digits", "digits/mini-fpd"} & {each["name"] for each in found}
    main([name, "--quiet"])
    assert capsys.readouterr().out == ""
    main([name])
    assert "\x1b" not in capsys.readouterr().out
