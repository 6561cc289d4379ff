from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.ranks import Ranks
from torch import nn

from robustfpd.distributed import (
    SINGLE_PROCESS,
    LaunchEnvironment,
    ProcessGroup,
    average_batch_norm_statistics,
    init_process_group,
    shared_errors,
    sigterm_as_interrupt,
)  # fmt: skip
from robustfpd.errors import InputError


def test_importing_needs_no_torch() -> None:
    code = (
        "import sys; from robustfpd.distributed import *; init_process_group(); ProcessGroup.current().gather(1)\n"
        "with shared_errors(): pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    assert subprocess.run([sys.executable, "-c", code], env=variables).returncode == 0


def test_launch_environment_is_read_from_variables() -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    environment = LaunchEnvironment.read(torchrun)
    assert environment == LaunchEnvironment("torchrun", 5, 8, 1, 4)
    assert environment.num_nodes == 2
    step = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    assert LaunchEnvironment.read(step) == LaunchEnvironment("srun", 5, 8, 1, 4)
    batch_script = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}
    assert LaunchEnvironment.read(batch_script) == LaunchEnvironment.read({}) == LaunchEnvironment()
    with pytest.raises(InputError, match="not as many on each node"):
        LaunchEnvironment.read({**step, "SLURM_STEP_NUM_TASKS": "7"})


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7])
def test_shards_cover_every_item_once(count: int) -> None:
    ranks = [ProcessGroup(rank, 3) for rank in range(3)]
    assert [i for rank in ranks for i in range(count)[rank.shard(count)]] == list(range(count))
    assert sorted(i for rank in ranks for i in range(count)[rank.batch_shard]) == list(range(count))
    assert len({rank.seed_purpose for rank in ranks}) == 3
    assert ranks[0].seed_purpose == SINGLE_PROCESS.seed_purpose == ()


def test_collectives_of_a_single_rank_return_their_argument() -> None:
    group = init_process_group()
    assert group == ProcessGroup.current() == SINGLE_PROCESS
    assert group.is_main
    assert group.gather(3) == [3]
    assert group.broadcast("here") == group.run_on_main(lambda: "here") == "here"
    group.check_equal({"seed": 0})
    mean = group.all_reduce_mean(torch.ones(2, requires_grad=True))
    assert not mean.requires_grad
    with pytest.raises(KeyError), shared_errors():
        raise KeyError("there")


def collectives(folder: Path) -> str:
    group = ProcessGroup.current()
    norm = nn.BatchNorm1d(2)
    assert norm.running_mean is not None
    norm.running_mean.fill_(group.rank)
    average_batch_norm_statistics(nn.Sequential(norm, nn.BatchNorm1d(2, track_running_stats=False)))
    return json.dumps(
        {
            "gather": group.gather(10 * group.rank), "broadcast": group.broadcast(f"rank {group.rank}"),
            "main": group.run_on_main(lambda: group.rank + 5),
            "mean": group.all_reduce_mean(torch.tensor(2.0 * group.rank)).item(),
            "statistics": norm.running_mean.tolist(),
        }
    )  # fmt: skip


def test_collectives_of_two_ranks(tmp_path: Path) -> None:
    results = Ranks(collectives, tmp_path, 2).join()
    assert [r.status for r in results] == ["done", "done"], results
    expected = {"gather": [0, 10], "broadcast": "rank 0", "main": 5, "mean": 1.0, "statistics": [0.5, 0.5]}
    assert [json.loads(r.value) for r in results] == [expected, expected]


def second_rank_fails(folder: Path) -> str:
    with shared_errors():
        if ProcessGroup.current().rank == 1:
            raise InputError("no such folder here")
    return ""


def nested_blocks(folder: Path) -> str:
    with shared_errors():
        second_rank_fails(folder)
    return ""


def main_rank_fails(folder: Path) -> str:
    ProcessGroup.current().run_on_main(lambda: 1 / 0)
    return ""


def different_seeds(folder: Path) -> str:
    ProcessGroup.current().check_equal({"suite": "quick", "seed": ProcessGroup.current().rank})
    return ""


@pytest.mark.parametrize(("function", "failing", "error", "message"), [
    (second_rank_fails, 1, "InputError", "no such folder here"),
    (nested_blocks, 1, "InputError", "no such folder here"),
    (main_rank_fails, 0, "ZeroDivisionError", "division by zero"),
    (different_seeds, 0, "InputError", "the ranks were given different seed"),
])  # fmt: skip
def test_an_error_of_one_rank_ends_all_with_one_message(
    function: Callable[[Path], str], failing: int, error: str, message: str, tmp_path: Path
) -> None:
    results = Ranks(function, tmp_path, 2).join()
    own, other = results[failing], results[1 - failing]
    assert own.status == error
    assert own.value.startswith(message)
    assert other.status == "ReportedByOtherRank"
    assert other.value.startswith(f"rank {failing} failed: {error}: {message}")


def test_sigterm_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
