"""Training in several processes: two of them on CPUs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.training import in_processes
from torch import Tensor

from robustfpd.config import TaskConfig
from robustfpd.errors import InputError
from robustfpd.models import build, load
from robustfpd.models.checkpoint import read_weights
from robustfpd.training import RunFolder
from robustfpd.training.sync_batchnorm import synchronise

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what they saw in all scenarios."""
    made: Path = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }  # fmt: skip
    # As torchrun would start them, without waiting for torchrun, which has to import torch itself.
    started = [
        subprocess.Popen(
            [sys.executable, in_processes.__file__, str(made)], stderr=subprocess.PIPE, text=True,
            env=_environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=240)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], [error[-2000:] for error in errors]
    return made


def _seen(folder: Path, scenario: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (torch.load(folder / f"{scenario}-{rank}.pt") for rank in (0, 1))
    return first, second


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", in_processes.CURVES)
def test_losses_are_those_of_one_process(folder: Path, tmp_path: Path, name: str) -> None:
    first, second = (seen[name] for seen in _seen(folder, "curves"))
    alone = in_processes.trained(in_processes.config(**in_processes.CURVES[name]), tmp_path / name)
    assert len(alone["losses"]) >= (in_processes.STEPS if name in ("detached", "joint") else 6)
    for mine, *theirs in zip(alone["losses"], first["losses"], second["losses"], strict=True):
        # As many losses: the gate was the same. Their parts are equal in size, so that their mean is the batch's.
        mean = [sum(pair) / 2 for pair in zip(*theirs, strict=True)]
        assert mean == pytest.approx(mine, rel=1e-3, abs=1e-3)
    assert _equal(first["weights"], second["weights"])
    assert first["history"] == second["history"]
    for row, expected in zip(first["history"], alone["history"], strict=True):
        assert row["gate_open"] == expected["gate_open"]
        assert row["ce"] == pytest.approx(expected["ce"], abs=1e-3)
        assert row["validation_ce"] == pytest.approx(expected["validation_ce"], abs=1e-3)


def test_some_steps_met_a_shut_gate_and_some_an_open_one(folder: Path) -> None:
    losses = _seen(folder, "curves")[0]["detached"]["losses"]
    assert {len(step) for step in losses} == {2, 4}


def test_resume_ends_with_the_same_weights(folder: Path) -> None:
    first, second = _seen(folder, "resumed")
    assert _equal(first["resumed"]["weights"], first["whole"]["weights"])
    assert first["resumed"]["history"] == first["whole"]["history"]
    assert _equal(first["resumed"]["weights"], second["resumed"]["weights"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_process_goes_on_where_two_were_interrupted(folder: Path, tmp_path: Path, strategy: str) -> None:
    shutil.copytree(folder / strategy / "cut", tmp_path / "run")
    assert len((RunFolder(tmp_path / "run").training_state() or {})["history"]) == 1
    found = in_processes.trained(in_processes.config(), tmp_path / "run", resume=True)
    expected = _seen(folder, "resumed")[0]["whole"]
    for row, other in zip(found["history"], expected["history"], strict=True):
        assert row["ce"] == pytest.approx(other["ce"], abs=1e-3)
        assert row["restoration"] == pytest.approx(other["restoration"], rel=1e-3)


def test_adversarial_training_is_one_training_too(folder: Path) -> None:
    first, second = _seen(folder, "attacked")
    assert _equal(first["weights"], second["weights"])
    assert first["history"] == second["history"]
    assert first["history"][0]["validation_robust_accuracy"] is not None
    assert first["losses"] != second["losses"]


@pytest.mark.parametrize(("case", "message"), [
    ("taken folder", "holds a run; continue it with --resume"), ("odd batch", "a multiple of 2 .*batch_size=32"),
    ("fsdp through", "strategy=ddp"), ("full disk", "no space left"),
])  # fmt: skip
def test_an_error_of_process_0_ends_both_and_is_told_once(folder: Path, case: str, message: str) -> None:
    first, second = (seen[case] for seen in _seen(folder, "failing"))
    assert first[0] != "ReportedByOtherRank"
    assert re.search(message, first[1])
    assert second[0] == "ReportedByOtherRank"


def test_an_error_of_another_process_ends_both_and_is_told_there(folder: Path) -> None:
    first, second = (seen["second process"] for seen in _seen(folder, "failing"))
    assert first == ["ReportedByOtherRank", "rank 1 failed: InputError: no such folder here"]
    assert second == ["InputError", "no such folder here"]


def test_one_process_writes_the_run(folder: Path) -> None:
    run = folder / "detached"
    assert len(list((run / "tensorboard").glob("events.*"))) == 1
    assert json.loads((run / "environment.json").read_text())["processes"] == 2
    task = TaskConfig(in_channels=1, num_classes=10, image_size=(8, 8))
    plain = build(task, in_processes.config().model, net=in_processes.Net())
    assert read_weights(run / "checkpoints" / "best").keys() == plain.state_dict().keys()


def test_batch_norm_takes_the_statistics_of_all_images(folder: Path) -> None:
    first, second = _seen(folder, "normalised")
    for name, (norm, images) in in_processes.norms().items():
        x = images.clone().requires_grad_()
        norm(images)
        y = norm(x)
        target = torch.linspace(-1, 1, images.numel()).reshape(images.shape)
        F.mse_loss(y, target, reduction="sum").backward()  # type: ignore[no-untyped-call]
        slopes = {n: p.grad for n, p in norm.named_parameters()}
        for key, expected in {"y": y, "slope": x.grad, **slopes, **dict(norm.named_buffers())}.items():
            assert expected is not None
            tolerance = 2e-3 if name == "far from zero" else 1e-4
            assert torch.allclose(first[name][key], expected.detach(), atol=tolerance, rtol=1e-4), (name, key)
            assert torch.equal(first[name][key], second[name][key]), (name, key)


def test_a_batch_norm_with_a_forward_pass_of_its_own_is_refused() -> None:
    class Odd(torch.nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return input

    with pytest.raises(InputError, match=r"0 is a Odd.*leave out sync_batchnorm=true"):
        synchronise(torch.nn.Sequential(Odd(3)))


def test_alone_strategy_and_sync_batchnorm_change_nothing(tmp_path: Path) -> None:
    plain, asked = (
        in_processes.trained(in_processes.config(epochs=1, **changes), tmp_path / name)["weights"]
        for name, changes in (("a", {"sync_batchnorm": False}), ("b", {"strategy": "fsdp"}))
    )
    assert _equal(plain, asked)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """`robustfpd train` in two processes."""
    settings = ["data.train_limit=64", "training.batch_size=16", "--out", str(tmp_path / "run"), "--device", "cpu"]
    return [*TORCHRUN, "-m", "robustfpd", "train", "digits/mini", *settings]


def test_the_command_has_one_voice(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [*command, "training.epochs=1", "--json"], capture_output=True, text=True, env=_environment(), timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["stages"][0]["epochs"] == 1
    assert "Warning" not in done.stderr
    assert load(tmp_path / "run") is not None


@pytest.fixture
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*command, "training.epochs=500"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=_environment(),
    )  # fmt: skip
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_signal_leaves_the_last_whole_epoch_and_says_how_to_go_on(
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
    kept = RunFolder(tmp_path / "run").training_state()
    assert kept is not None
    assert len(kept["history"]) >= 1
