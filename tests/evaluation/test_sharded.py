from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.ranks import Ranks
from torch import nn

from robustfpd.distributed import ProcessGroup
from robustfpd.evaluation import EvaluationRecord, evaluate
from robustfpd.evaluation.ledger import Ledger, read_rows


def install_suite() -> None:
    """Install a short suite with attacks of every kind."""
    from robustfpd.evaluation import inputs, suites
    from robustfpd.evaluation.suites import AttackSpec, Suite, SuiteContext

    def short(target: SuiteContext) -> list[AttackSpec]:
        return [
            AttackSpec("FGSM", "fgsm"),
            AttackSpec("PGD", "pgd", options={"steps": 4, "restarts": 2, "early_stop": True}),
            AttackSpec("APGD-T", "apgd-t", options={"steps": 4, "targets": 2}),
            AttackSpec("FMN", "fmn", options={"steps": 6}),
            AttackSpec("Square", "square", options={"queries": 6}, share=1 / 8),
        ]

    inputs.SMALLEST_BLOCK = 10
    suites._SUITES["short"] = Suite(short, probes=4)


SETTINGS: dict[str, Any] = {"suite": "short", "eps": (0.01, 0.03), "seed": 3, "batch_size": 7, "gallery": 2}


class Net(nn.Module):
    """A small network that is interrupted in its forward pass number `interrupt_at`."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(0.5 * torch.randn(36, 12, generator=draws))
        self.second = nn.Parameter(0.8 * torch.randn(12, 3, generator=draws))
        self.calls, self.interrupt_at = 0, -1
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        out: torch.Tensor = torch.tanh((images.flatten(1) - 0.5) @ self.first) @ self.second
        return out


def images() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(75, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    labels = Net()(x).argmax(1)
    labels[::9] = (labels[::9] + 1) % 3
    return x, labels


def finishes(folder: Path) -> str:
    """Evaluate; return the robust accuracy and the number of the network's forward passes."""
    net = Net()
    record = _evaluate(net, folder)
    return f"{record.robust_accuracy} {net.calls}"


def interrupted(folder: Path) -> str:
    """Evaluate, and be interrupted."""
    net = Net()
    net.interrupt_at = 230
    _evaluate(net, folder)
    return "not interrupted"


def different_weights(folder: Path) -> str:
    """Evaluate with other weights on rank 1."""
    net = Net()
    net.second.data += 1e-3 * ProcessGroup.current().rank
    _evaluate(net, folder)
    return "no error"


def broken_ledger(folder: Path) -> str:
    """Evaluate where rank 0 cannot write."""
    if ProcessGroup.current().is_main:
        Ledger.add = lambda self, rows: 1 / 0  # type: ignore[method-assign, assignment]
    _evaluate(Net(), folder)
    return "no error"


def another_evaluation(folder: Path) -> str:
    """Evaluate into the folder of another evaluation."""
    install_suite()
    evaluate(Net(), images(), out_dir=folder, **{**SETTINGS, "seed": 4})
    return "no error"


def _evaluate(net: Net, folder: Path) -> EvaluationRecord:
    install_suite()
    return evaluate(net, images(), out_dir=folder, **SETTINGS)


def _timeless(record: EvaluationRecord) -> dict[str, Any]:
    """All of a record but times and machine."""
    seconds = {"__all__": {"seconds"}}
    return record.model_dump(exclude={"environment": True, "attacks": seconds, "ledger": seconds})


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    """The record of one process, with as many threads as a rank, and its number of forward passes."""
    from robustfpd.evaluation import inputs, suites

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    smallest, net = inputs.SMALLEST_BLOCK, Net()
    install_suite()
    record = evaluate(net, images(), out_dir=tmp_path_factory.mktemp("single"), **SETTINGS)
    inputs.SMALLEST_BLOCK = smallest
    del suites._SUITES["short"]
    torch.set_num_threads(threads)
    assert {a.attack for a in record.attacks if a.misclassified} >= {"FGSM", "PGD"}
    assert record.clean.count > record.worst_case[0].robust.count > record.worst_case[1].robust.count > 0
    return _timeless(record), net.calls


def test_two_ranks_return_the_record_of_one_and_share_the_passes(
    single: tuple[dict[str, Any], int], tmp_path: Path
) -> None:
    results = Ranks(finishes, tmp_path, 2).join()
    assert [r.status for r in results] == ["done", "done"], results
    record = EvaluationRecord.load(tmp_path / "record.json")
    assert _timeless(record) == single[0]
    values = [r.value.split() for r in results]
    assert [accuracy for accuracy, _ in values] == 2 * [str(record.robust_accuracy)]
    assert all(int(calls) < 0.9 * single[1] for _, calls in values)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["record.gallery", "record.json", "record.ledger.csv"]
    # The command line goes on under another name, so every rank must see this error.
    assert [r.status for r in Ranks(another_evaluation, tmp_path, 2).join()] == 2 * ["OtherEvaluation"]


def test_two_ranks_resume_what_one_began_and_the_reverse(single: tuple[dict[str, Any], int], tmp_path: Path) -> None:
    both, one = tmp_path / "both", tmp_path / "one"
    begun = Ranks(interrupted, both, 2), Ranks(interrupted, one, 1)
    statuses = [r.status for ranks in begun for r in ranks.join()]
    assert "done" not in statuses, statuses
    rows = [len(read_rows(folder / "record.ledger.csv")) for folder in (both, one)]
    assert all(75 < count < len(single[0]["ledger"]) for count in rows), rows
    resumed = Ranks(finishes, both, 1), Ranks(finishes, one, 2)
    assert [r.status for ranks in resumed for r in ranks.join()] == 3 * ["done"]
    for folder in (both, one):
        assert _timeless(EvaluationRecord.load(folder / "record.json")) == single[0]


@pytest.mark.parametrize(("function", "error", "message"), [
    (broken_ledger, "ZeroDivisionError", "division by zero"),
    (different_weights, "InputError", "the ranks were given different weights"),
])  # fmt: skip
def test_an_error_of_one_rank_ends_all(
    function: Callable[[Path], str], error: str, message: str, tmp_path: Path
) -> None:
    first, second = Ranks(function, tmp_path, 2).join()
    assert first.status == error
    assert first.value.startswith(message)
    assert second.status == "ReportedByOtherRank"  # the command line prints nothing for it


def beside_a_contradiction(folder: Path) -> str:
    """Evaluate beside a record that finds more adversarial examples at a smaller radius; only rank 0 may read it."""
    from robustfpd.evaluation.checks import contradictions

    if not ProcessGroup.current().is_main:
        contradictions.read_beside = lambda record, path: 1 / 0  # type: ignore[assignment, return-value]
    return _evaluate(Net(), folder).headline


def test_rank_0_reads_the_records_beside_and_all_ranks_return_the_verdict(
    single: tuple[dict[str, Any], int], tmp_path: Path
) -> None:
    other = EvaluationRecord(**{**single[0], "environment": {}, **_without_survivors(single[0])})
    other.save(tmp_path / "other.json")
    results = Ranks(beside_a_contradiction, tmp_path, 2).join()
    assert [r.status for r in results] == ["done", "done"], results
    assert results[0].value == results[1].value == EvaluationRecord.load(tmp_path / "record.json").headline
    assert "measurement is not reliable (contradictions: " in results[0].value


def _without_survivors(values: dict[str, Any]) -> dict[str, Any]:
    """Return the results of the same evaluation at a smaller radius under which no image is robust."""
    attacks = [{**a, "seconds": 0.0} for a in values["attacks"]]
    worst = {"eps": 0.005, "robust": {"count": 0, "total": 75, "low": 0.0, "high": 0.05}}
    return {"worst_case": [worst], "attacks": attacks, "ledger": []}
