from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from robustfpd.cli.common import told_once
from robustfpd.errors import InputError
from robustfpd.evaluation import EvaluationRecord, evaluate
from robustfpd.evaluation.ledger import Ledger, read_rows
from robustfpd.evaluation.sharing import by_first, in_step, together
from robustfpd.processes import Processes
from robustfpd.together import join


def begin() -> None:
    """Install a short suite with attacks of every kind."""
    from robustfpd.evaluation import memory, suites
    from robustfpd.evaluation.suites import AttackSpec, Suite, SuiteContext

    def short(target: SuiteContext) -> list[AttackSpec]:
        return [
            AttackSpec("FGSM", "fgsm"),
            AttackSpec("PGD", "pgd", options={"steps": 4, "restarts": 2, "early_stop": True}),
            AttackSpec("APGD-T", "apgd-t", options={"steps": 4, "targets": 2}),
            AttackSpec("FMN", "fmn", options={"steps": 6}),
            AttackSpec("Square", "square", options={"queries": 6}, screened=True),
        ]

    memory.SMALLEST_BLOCK = 10
    suites._SUITES["short"] = Suite(short, probes=4)


SETTINGS: dict[str, Any] = {"suite": "short", "eps": (0.01, 0.03), "seed": 3, "batch_size": 7, "gallery": 2}


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


class Ended(NamedTuple):
    """How a process ended."""

    rank: int
    ending: str
    """Kind of the exception that ended it, or `done`."""
    told: str
    """What it made, or the exception's message."""


def _process(action: Callable[[Path], str], folder: Path, rank: int, count: int, port: int, ends: Any) -> None:
    given = {
        "TORCHELASTIC_RUN_ID": "test", "RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in given.items()})
    torch.set_num_threads(1)
    begin()
    try:
        processes = join("cpu")
        assert (processes.rank, processes.size) == (rank, count)
        made = action(folder)
        ends.put(Ended(rank, "done", made))
    except BaseException as error:
        ends.put(Ended(rank, type(error).__name__, str(error)))


class Several:
    """Processes that share a job."""

    def __init__(self, action: Callable[[Path], str], folder: Path, count: int) -> None:
        context = multiprocessing.get_context("forkserver")  # imports once, and forks where no thread runs
        context.set_forkserver_preload(["robustfpd.evaluation", "foolbox", "pyautoattack", __name__])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ends: Any = context.Queue()
        arguments = [(action, folder, rank, count, port, self.ends) for rank in range(count)]
        self.processes = [context.Process(target=_process, args=a, daemon=True) for a in arguments]
        for process in self.processes:
            process.start()

    def ended(self, seconds: float = 60) -> list[Ended]:
        """How all of them ended, by rank."""
        found = sorted(self.ends.get(timeout=seconds) for _ in self.processes)
        for process in self.processes:
            process.kill()
            process.join()
        return found


def whole(folder: Path) -> str:
    """Evaluate; tell the robust accuracy and how often the network was asked."""
    net = Net()
    record = evaluate(net, images(), out_dir=folder, **SETTINGS)
    return f"{record.robust_accuracy} {net.calls}"


def killed(folder: Path) -> str:
    """Evaluate, and be interrupted."""
    net = Net()
    net.left = 230
    evaluate(net, images(), out_dir=folder, **SETTINGS)
    return "not killed"


def other_weights(folder: Path) -> str:
    """Evaluate with other weights on process 1."""
    net = Net()
    net.second.data += 1e-3 * Processes.now().rank
    with told_once():
        evaluate(net, images(), out_dir=folder, **SETTINGS)
    return "nothing went wrong"


def broken_ledger(folder: Path) -> str:
    """Evaluate where process 0 cannot write."""
    if Processes.now().first:
        Ledger.add = lambda self, rows: 1 / 0  # type: ignore[method-assign, assignment]
    evaluate(Net(), images(), out_dir=folder, **SETTINGS)
    return "nothing went wrong"


def _timeless(record: EvaluationRecord) -> dict[str, Any]:
    """All of a record but what the clock and the machine say."""
    seconds = {"__all__": {"seconds"}}
    return record.model_dump(exclude={"environment": True, "attacks": seconds, "ledger": seconds})


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    """The record of one process, with the threads of those below, and how often it asked the network."""
    from robustfpd.evaluation import memory, suites

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    smallest, net = memory.SMALLEST_BLOCK, Net()
    begin()
    record = evaluate(net, images(), out_dir=tmp_path_factory.mktemp("alone"), **SETTINGS)
    memory.SMALLEST_BLOCK = smallest
    del suites._SUITES["short"]
    torch.set_num_threads(threads)
    assert {a.attack for a in record.attacks if a.misclassified} >= {"FGSM", "PGD"}
    assert record.clean.count > record.worst_case[0].robust.count > record.worst_case[1].robust.count > 0
    return _timeless(record), net.calls


def test_two_processes_make_the_record_of_one_and_each_asks_less(
    alone: tuple[dict[str, Any], int], tmp_path: Path
) -> None:
    ended = Several(whole, tmp_path, 2).ended()
    assert [e.ending for e in ended] == ["done", "done"], ended
    record = EvaluationRecord.load(tmp_path / "record.json")
    assert _timeless(record) == alone[0]
    told = [e.told.split() for e in ended]
    assert [accuracy for accuracy, _ in told] == 2 * [str(record.robust_accuracy)]
    assert all(int(asked) < 0.9 * alone[1] for _, asked in told)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["record.gallery", "record.json", "record.ledger.csv"]


def test_what_two_began_one_ends_and_the_reverse(alone: tuple[dict[str, Any], int], tmp_path: Path) -> None:
    both, one = tmp_path / "both", tmp_path / "one"
    begun = Several(killed, both, 2), Several(killed, one, 1)
    endings = [e.ending for several in begun for e in several.ended()]
    assert "done" not in endings, endings
    kept = [len(read_rows(folder / "record.ledger.csv")) for folder in (both, one)]
    assert all(75 < rows < len(alone[0]["ledger"]) for rows in kept), kept
    resumed = Several(whole, both, 1), Several(whole, one, 2)
    assert [e.ending for several in resumed for e in several.ended()] == 3 * ["done"]
    for folder in (both, one):
        assert _timeless(EvaluationRecord.load(folder / "record.json")) == alone[0]


def test_what_goes_wrong_on_one_ends_all(tmp_path: Path) -> None:
    ended = Several(broken_ledger, tmp_path, 2).ended()
    message = "process 0: ZeroDivisionError: division by zero"
    assert [(e.ending, e.told) for e in ended] == 2 * [("InputError", message)]


def test_what_the_user_can_mend_is_told_once(tmp_path: Path) -> None:
    first, second = Several(other_weights, tmp_path, 2).ended()
    assert first.ending == "InputError"
    assert first.told.startswith("the processes were given different weights")
    assert second.ending == "ReportedByOtherRank"  # the command line keeps silent about it


def test_one_process_shares_with_nobody() -> None:
    one = Processes()
    assert together(one, lambda: 3) == [3]
    assert by_first(one, lambda: None) is None
    assert in_step(one, lambda: "here") == "here"
    with pytest.raises(KeyError):
        together(one, lambda: dict[str, int]()["there"])
    with pytest.raises(InputError):
        together(one, lambda: evaluate(Net(), images(), eps=-1))
