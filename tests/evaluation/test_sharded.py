from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robustfpd.errors import InputError
from robustfpd.evaluation import EvaluationRecord, evaluate
from robustfpd.evaluation.ledger import read_rows
from robustfpd.evaluation.sharing import by_first, in_step, together
from robustfpd.processes import Processes

SCRIPT = """
import sys

import torch

sys.path.insert(0, {root!r})
from tests.evaluation.test_sharded import begin, Net, SETTINGS, images
from robustfpd.cli.joining import joined, told_once, started
from robustfpd.errors import InputError
from robustfpd.evaluation import evaluate

torch.set_num_threads(1)
begin()
net, folder = Net(), {folder!r}
"""


def begin() -> None:
    """Install a short suite with attacks of every kind."""
    from robustfpd.evaluation import memory
    from robustfpd.evaluation import suite as suites
    from robustfpd.evaluation.suite import Planned, Suite, Target

    def short(target: Target) -> list[Planned]:
        return [
            Planned("FGSM", "fgsm"),
            Planned("PGD", "pgd", options={"steps": 4, "restarts": 2, "early_stop": True}),
            Planned("APGD-T", "apgd-t", options={"steps": 4, "targets": 2}),
            Planned("FMN", "fmn", options={"steps": 6}),
            Planned("Square", "square", options={"queries": 6}, screened=True),
        ]

    memory.SMALLEST_BLOCK = 10
    suites._SUITES["short"] = Suite(short, probes=4)


SETTINGS: dict[str, Any] = {"suite": "short", "eps": (0.01, 0.03), "seed": 3, "batch_size": 7, "exhibits": 2}


class Net(nn.Module):
    """A small network that fails when it was asked `left` times."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(0.5 * torch.randn(36, 12, generator=draws))
        self.second = nn.Parameter(0.8 * torch.randn(12, 3, generator=draws))
        self.calls, self.left = 0, -1
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.left:
            raise KeyboardInterrupt
        out: torch.Tensor = torch.tanh((images.flatten(1) - 0.5) @ self.first) @ self.second
        return out


def images() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(75, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    labels = Net()(x).argmax(1)
    labels[::9] = (labels[::9] + 1) % 3
    return x, labels


def _started(folder: Path, body: str, count: int = 2) -> list[subprocess.Popen[str]]:
    root = str(Path(__file__).parents[2])
    code = SCRIPT.format(root=root, folder=str(folder)) + textwrap.dedent(body)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code], env={**given, "RANK": str(rank), "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root,
        )
        for rank in range(count)
    ]  # fmt: skip


def _ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    try:
        told = [p.communicate(timeout=90) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, told, strict=True)]


WHOLE = """
with joined() as processes:
    record = evaluate(net, images(), out_dir=folder, **SETTINGS)
print(processes.rank, processes.size, record.robust_accuracy, net.calls)
"""


def _timeless(record: EvaluationRecord) -> dict[str, Any]:
    """All of a record but what the clock and the machine say."""
    seconds = {"__all__": {"seconds"}}
    return record.model_dump(exclude={"environment": True, "attacks": seconds, "ledger": seconds})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    """The record of one process, with the threads of those below, and how often it asked the network."""
    from robustfpd.evaluation import memory
    from robustfpd.evaluation import suite as suites

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    smallest, net = memory.SMALLEST_BLOCK, Net()
    begin()
    record = evaluate(net, images(), out_dir=tmp_path_factory.mktemp("alone"), **SETTINGS)
    memory.SMALLEST_BLOCK = smallest
    del suites._SUITES["short"]
    torch.set_num_threads(threads)
    assert {a.attack for a in record.attacks if a.fooled} >= {"FGSM", "PGD"}
    assert record.clean.count > record.worst_case[0].robust.count > record.worst_case[1].robust.count > 0
    return _timeless(record), net.calls


def test_two_processes_make_the_record_of_one_and_each_asks_less(
    alone: tuple[dict[str, Any], int], tmp_path: Path
) -> None:
    ended = _ended(_started(tmp_path, WHOLE))
    assert [code for code, _, _ in ended] == [0, 0], ended
    record = EvaluationRecord.load(tmp_path / "record.json")
    assert _timeless(record) == alone[0]
    told = [out.split() for _, out, _ in ended]
    assert [t[:3] for t in told] == [["0", "2", str(record.robust_accuracy)], ["1", "2", str(record.robust_accuracy)]]
    assert all(int(t[3]) < 0.9 * alone[1] for t in told)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["record.exhibits", "record.json", "record.ledger.csv"]


KILLED = """
net.left = 230
with joined() as processes:
    evaluate(net, images(), out_dir=folder, **SETTINGS)
"""


def test_what_two_began_one_ends_and_the_reverse(alone: tuple[dict[str, Any], int], tmp_path: Path) -> None:
    both, one = tmp_path / "both", tmp_path / "one"
    first = [*_started(both, KILLED), *_started(one, KILLED, count=1)]
    assert all(code != 0 for code, _, _ in _ended(first))
    kept = [len(read_rows(folder / "record.ledger.csv")) for folder in (both, one)]
    assert all(75 < rows < len(alone[0]["ledger"]) for rows in kept), kept
    ended = _ended([*_started(both, WHOLE, count=1), *_started(one, WHOLE)])
    assert [code for code, _, _ in ended] == [0, 0, 0], ended
    for folder in (both, one):
        assert _timeless(EvaluationRecord.load(folder / "record.json")) == alone[0]


FAILING = """
from robustfpd.evaluation.ledger import Ledger
from robustfpd.evaluation.sharing import together

with told_once(), joined() as processes:
    if processes.rank == {rank}:
        {fault}
    try:
        evaluate(net, images(), out_dir=folder, **SETTINGS)
    except InputError as error:
        print(error)
        raise
"""


@pytest.mark.parametrize(
    ("rank", "fault", "message"),
    [
        (1, "net.second.data += 1e-3", "the processes were given different classifiers"),
        (0, "Ledger.add = lambda self, rows: 1 / 0", "process 0: ZeroDivisionError: division by zero"),
    ],
)
def test_what_goes_wrong_on_one_ends_all_with_one_message(tmp_path: Path, rank: int, fault: str, message: str) -> None:
    ended = _ended(_started(tmp_path, FAILING.format(rank=rank, fault=fault)))
    assert all(code != 0 and message in out for code, out, _ in ended), ended
    assert ended[1][2] == ""


def test_one_process_shares_with_nobody() -> None:
    one = Processes()
    assert together(one, lambda: 3) == [3]
    assert by_first(one, lambda: None) is None
    assert in_step(one, lambda: "here") == "here"
    with pytest.raises(KeyError):
        together(one, lambda: {}["there"])
    with pytest.raises(InputError):
        together(one, lambda: evaluate(Net(), images(), eps=-1))
