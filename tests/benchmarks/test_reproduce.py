from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import robustfpd as rf
from benchmarks import reproduce
from robustfpd.evaluation import EvaluationRecord, Proportion
from robustfpd.models import zoo
from robustfpd.report.leaderboard import DESCRIPTION, RECORD, read_entries

ROOT = Path(__file__).parents[2]
NAME = "digits/mini-fpd"


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EvaluationRecord:
    """The record of a network of the zoo; the leaderboard is an empty folder."""
    (tmp_path / "leaderboard").mkdir()
    monkeypatch.setattr(reproduce, "LEADERBOARD", tmp_path / "leaderboard")
    return EvaluationRecord.load(ROOT / "models" / zoo.manifest().models[NAME].results[0])


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["reproduce", *arguments])
    return reproduce.main()


def test_a_record_is_repeated_with_its_settings_on_its_images_and_compared(
    committed: EvaluationRecord, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[dict[str, Any]] = []

    def evaluate(classifier: torch.nn.Module, data: tuple[torch.Tensor, torch.Tensor], **options: Any) -> Any:
        calls.append(options)
        with torch.no_grad():
            correct = int((classifier(data[0]).argmax(dim=1) == data[1]).sum())
        assert (correct, len(data[1])) == (committed.clean.count, committed.clean.total)
        return fresh

    monkeypatch.setattr(rf, "evaluate", evaluate)
    fresh = committed
    assert run(monkeypatch, NAME) == 0
    assert f"{NAME}: reproduced" in capsys.readouterr().out
    (options,) = calls
    assert (options["suite"], options["norm"], options["seed"]) == (committed.suite, committed.norm, committed.seed)
    assert options["eps"] == [worst.eps for worst in committed.worst_case]
    assert options["num_images"] == committed.num_images

    lost = committed.worst_case[0].model_copy(update={"robust": Proportion.of(200, committed.num_images)})
    fresh = committed.model_copy(update={"worst_case": (lost, *committed.worst_case[1:])})
    assert run(monkeypatch, NAME) == 1
    assert f"{NAME}: robust at eps 0.05: 93.0 %" in capsys.readouterr().out


def test_a_new_entry_gets_its_record_and_can_then_be_read(
    committed: EvaluationRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rf, "evaluate", lambda *_, **__: committed)
    home = reproduce.LEADERBOARD / "mine"
    home.mkdir()
    description = {
        "title": "Mine", "model": NAME, "training": "noise", "dataset": "digits", "images": "the test images",
        "data": {"dataset": "digits"}, "source": "us", "licence": "MIT",
    }  # fmt: skip
    (home / DESCRIPTION).write_text(yaml.safe_dump(description))
    assert run(monkeypatch, "--add", "mine", "--eps", "0.1") == 0
    assert (home / RECORD).is_file()
    (entry,) = read_entries(reproduce.LEADERBOARD)
    assert entry.record.worst_case == committed.worst_case
    assert run(monkeypatch, "mine") == 0


def test_a_network_is_loaded_from_a_module_beside_its_entry(tmp_path: Path) -> None:
    for name, bias in (("a", 1.0), ("b", 2.0)):  # modules of one name
        (tmp_path / name).mkdir()
        code = f"import torch\ndef make():\n    net = torch.nn.Linear(1, 1)\n    net.bias.data.fill_({bias})\n"
        code += "    return net\n"
        (tmp_path / name / "network_of_entry.py").write_text(code)
        loaded = reproduce.load_classifier("network_of_entry:make", tmp_path / name, tmp_path)
        assert isinstance(loaded, torch.nn.Linear)
        assert loaded.bias.item() == bias
        assert not loaded.training


def test_an_unknown_name_is_an_error(
    committed: EvaluationRecord, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "digits/mini")
    _, message = capsys.readouterr()
    assert "no entry digits/mini; known are digits/" in message


def test_networks_whose_files_are_absent_are_skipped_but_fail_by_name(
    committed: EvaluationRecord, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    home = reproduce.LEADERBOARD / "trades"
    home.mkdir()
    description = yaml.safe_load((ROOT / "results/leaderboard/trades-mnist-smallcnn/entry.yaml").read_text())
    (home / DESCRIPTION).write_text(yaml.safe_dump(description))
    committed.save_summary(home / RECORD)
    monkeypatch.setattr(reproduce, "zoo_entries", lambda _: [])
    assert run(monkeypatch, "--weights", str(tmp_path)) == 0
    assert run(monkeypatch, "trades", "--weights", str(tmp_path)) == 1
    assert "trades: skipped, its weights are not in" in capsys.readouterr().out
