"""Training on several ranks: two of them, on CPUs, started once for the module."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks import Ranks
from tests.training import scenarios
from torch import Tensor

from robustfpd.config import TaskConfig
from robustfpd.models import build, load
from robustfpd.models.checkpoint import read_weights
from robustfpd.training import RunFolder

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which two ranks have run all scenarios."""
    path: Path = tmp_path_factory.mktemp("ranks")
    results = Ranks(scenarios.run_all, path, 2).join(240)
    assert [result.status for result in results] == ["done", "done"], results
    return path


def _observed(folder: Path, scenario: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (torch.load(folder / f"{scenario}-{rank}.pt") for rank in (0, 1))
    return first, second


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("name", "steps"), [("detached", 50), ("joint", 20), ("through", 6)])
def test_losses_are_those_of_one_process(folder: Path, tmp_path: Path, name: str, steps: int) -> None:
    first, second = (ranks[name] for ranks in _observed(folder, "curves"))
    single = scenarios.trained(scenarios.config(**scenarios.CURVES[name]), tmp_path / name)
    assert len(single["losses"]) == steps
    for expected, *ranks in zip(single["losses"], first["losses"], second["losses"], strict=True):
        # As many losses: the gate was the same. Their parts are equal in size, so that their mean is the batch's.
        mean = [sum(pair) / 2 for pair in zip(*ranks, strict=True)]
        assert mean == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert _equal(first["weights"], second["weights"])
    assert first["history"] == second["history"]
    for row, expected in zip(first["history"], single["history"], strict=True):
        assert row["gate_open"] == expected["gate_open"]
        assert row["ce"] == pytest.approx(expected["ce"], abs=1e-3)
        assert row["validation_ce"] == pytest.approx(expected["validation_ce"], abs=1e-3)


def test_some_steps_have_a_shut_gate_and_some_an_open_one(folder: Path) -> None:
    history = _observed(folder, "curves")[0]["detached"]["history"]
    assert 0 < sum(row["gate_open"] for row in history) < len(history)
    assert history[0]["gate_opened"] is None
    assert history[-1]["gate_opened"] is not None
    losses = _observed(folder, "curves")[0]["detached"]["losses"]
    assert {len(step) for step in losses} == {2, 4}


def test_resume_ends_with_the_same_weights(folder: Path) -> None:
    first, second = _observed(folder, "resumed")
    assert _equal(first["resumed"]["weights"], first["whole"]["weights"])
    assert first["resumed"]["history"] == first["whole"]["history"] == second["resumed"]["history"]
    assert _equal(first["resumed"]["weights"], second["resumed"]["weights"])


def test_one_rank_resumes_what_two_have_begun(folder: Path) -> None:
    assert len((RunFolder(folder / "copy").training_state() or {})["history"]) == 1
    resumed = scenarios.trained(scenarios.config(), folder / "copy", resume=True)
    expected = _observed(folder, "resumed")[0]["whole, group norm"]
    for row, other in zip(resumed["history"], expected["history"], strict=True):
        assert row["ce"] == pytest.approx(other["ce"], abs=1e-3)
        assert row["restoration"] == pytest.approx(other["restoration"], rel=1e-3)


def test_adversarial_training_is_one_training_too(folder: Path) -> None:
    first, second = _observed(folder, "attacked")
    assert _equal(first["weights"], second["weights"])
    assert first["history"] == second["history"]
    assert first["history"][0]["validation_robust_accuracy"] is not None
    assert first["losses"] != second["losses"]


@pytest.mark.parametrize(("case", "message"), [
    ("taken folder", "holds a run; continue it with --resume"), ("odd batch", "a multiple of 2.*batch_size=32"),
    ("sync_batchnorm", "needs GPUs.*leave out sync_batchnorm=true"), ("full disk", "no space left"),
])  # fmt: skip
def test_an_error_of_rank_0_ends_both_and_is_reported_once(folder: Path, case: str, message: str) -> None:
    first, second = (errors[case] for errors in _observed(folder, "failing"))
    assert first[0] != "ReportedByOtherRank"
    assert re.search(message, first[1])
    assert second[0] == "ReportedByOtherRank"


def test_an_error_of_another_rank_ends_both_and_is_reported_there(folder: Path) -> None:
    first, second = (errors["rank 1"] for errors in _observed(folder, "failing"))
    assert first[0] == "ReportedByOtherRank"
    assert second == ["InputError", "no such folder here"]


def test_one_rank_writes_the_run(folder: Path) -> None:
    run = folder / "detached"
    assert len(list((run / "tensorboard").glob("events.*"))) == 1
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    task = TaskConfig(in_channels=1, num_classes=10, image_size=(8, 8))
    single = build(task, scenarios.config().model, net=scenarios.Net())
    assert read_weights(run / "checkpoints" / "best").keys() == single.state_dict().keys()


def test_in_one_process_sync_batchnorm_changes_nothing(tmp_path: Path) -> None:
    a, b = (
        scenarios.trained(scenarios.config(epochs=1, sync_batchnorm=on), tmp_path / str(on), batch_norm=True)["weights"]
        for on in (False, True)
    )
    assert _equal(a, b)


def test_the_command_prints_on_rank_0_alone(folder: Path) -> None:
    first, second = _observed(folder, "command")
    assert json.loads(first["out"])["stages"][0]["epochs"] == 1
    assert "Warning" not in first["error"]
    assert second == {"out": "", "error": ""}
    assert load(folder / "command") is not None


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`robustfpd train` on two ranks, started by torchrun."""
    words = ["digits/mini", "data.train_limit=64", "training.batch_size=16", "training.epochs=500", "--device", "cpu"]
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "robustfpd", "train", *words, "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_signal_keeps_the_last_finished_epoch_and_prints_how_to_resume(
    running: subprocess.Popen[str], tmp_path: Path
) -> None:
    state = tmp_path / "run" / "checkpoints" / "last" / "training.pt"
    for _ in range(600):
        if state.is_file() or running.poll() is not None:
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    out, error = running.communicate(timeout=60)
    assert out.count("interrupted; ") == 1, error[-2000:]
    assert "under torchrun as before:\n  robustfpd train digits/mini" in out
    assert out.rstrip().endswith("--resume")
    state_dict = RunFolder(tmp_path / "run").training_state()
    assert state_dict is not None
    assert len(state_dict["history"]) >= 1
