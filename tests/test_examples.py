"""The scripts in examples/ run as they stand."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import SHARED

EXAMPLES = Path(__file__).parents[1] / "examples"
CHECKPOINT = SHARED / "published" / "resnet_mnist_1-1-1-1" / "bestmodel_params.pkl"


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_has_a_test() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    tests = [name.removeprefix("test_") for name in globals()]
    assert all(any(test.startswith(name) for test in tests) for name in names)


def test_evaluate_my_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run("evaluate_my_model.py", monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert "robust accuracy at eps 0.1" in printed
    assert "is the measurement reliable? " in printed


def test_defend_my_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    run("defend_my_model.py", str(tmp_path / "run"), monkeypatch=monkeypatch)
    assert "clean accuracy" in capsys.readouterr().out
    assert (tmp_path / "run" / "evaluation" / "record.json").is_file()


def test_load_author_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    if not CHECKPOINT.is_file():
        pytest.skip("no checkpoint of the authors beside the project")
    run("load_author_checkpoint.py", str(CHECKPOINT), str(tmp_path / "model"), monkeypatch=monkeypatch)
    assert "same logits after loading: True" in capsys.readouterr().out


def test_compare_two_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    run("compare_two_runs.py", str(tmp_path), monkeypatch=monkeypatch)
    assert "baseline: clean" in capsys.readouterr().out
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_own_training_loop_learns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        run("own_training_loop.py", monkeypatch=monkeypatch)
    *epochs, clean, attacked = capsys.readouterr().out.splitlines()
    losses = [float(line.split("cross-entropy ")[1].split(",")[0]) for line in epochs]
    assert losses[-1] < losses[0] - 0.3
    assert float(clean.split()[-1]) > 0.8
    assert float(attacked.split()[-1]) < float(clean.split()[-1])
