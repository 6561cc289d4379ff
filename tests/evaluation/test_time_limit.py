"""Evaluations that end early, by their time limit or by Ctrl-C, and go on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustfpd.errors import InputError
from robustfpd.evaluation import Check, EvaluationRecord, evaluate, suites, time_limit
from robustfpd.evaluation.checks import NAMES, attacks
from robustfpd.evaluation.suites import AttackSpec, Suite

SETTINGS: dict[str, Any] = {"gallery": 0, "suite": "small", "eps": (0.01, 0.04), "batch_size": 9}
SPECS = [
    AttackSpec("FGSM", "fgsm"),
    AttackSpec("PGD", "pgd", options={"steps": 3, "early_stop": True}),
    AttackSpec("FMN", "fmn", options={"steps": 5}),
    AttackSpec("Square", "square", options={"queries": 6}, share=1 / 8),
]


class Net(nn.Module):
    """A small network with random outputs; it is interrupted at its forward pass number `left`."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.first = nn.Parameter(0.5 * torch.randn(36, 12, generator=draws))
        self.second = nn.Parameter(0.8 * torch.randn(12, 3, generator=draws))
        self.noise, self.calls, self.left = noise, 0, -1
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.left:
            raise KeyboardInterrupt
        out: Tensor = torch.tanh((images.flatten(1) - 0.5) @ self.first) @ self.second
        return out + self.noise * torch.randn_like(out)


class Clock:
    """Time that passes by one second each time it is read, as before each batch and each pass of a check."""

    def __init__(self) -> None:
        self.now = 0

    def monotonic(self) -> float:
        self.now += 1
        return float(self.now)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time_limit, "time", clock)
    monkeypatch.setitem(suites._SUITES, "small", Suite(lambda context: SPECS, probes=8))
    monkeypatch.setattr(attacks, "STEPS", 3)
    monkeypatch.setattr(attacks, "MORE_STEPS", 4)
    return clock


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    x = torch.rand(30, 1, 6, 6, generator=torch.Generator().manual_seed(5))
    labels = Net()(x).argmax(1)
    labels[::7] = (labels[::7] + 1) % 3
    return x, labels


def _timeless(record: EvaluationRecord) -> dict[str, Any]:
    seconds = {"__all__": {"seconds"}}
    return record.model_dump(exclude={"environment": True, "attacks": seconds, "ledger": seconds})


def _limited(net: Net, images: tuple[Tensor, Tensor], folder: Path | None = None, *, seconds: int) -> EvaluationRecord:
    return evaluate(net, images, out_dir=folder, max_minutes=(seconds + 0.5) / 60, **SETTINGS)


def _complete(record: EvaluationRecord) -> Check:
    return next(check for check in record.verdict.checks if check.name == "complete")


def _limits(clock: Clock, images: tuple[Tensor, Tensor]) -> Iterator[int]:
    """Every number of readings of the clock at which an evaluation may end."""
    clock.now = 0
    assert evaluate(Net(), images, max_minutes=1e6, **SETTINGS).complete
    return iter(range(1, clock.now - 1))


def test_an_evaluation_that_ends_anywhere_states_what_is_left_out(clock: Clock, images: tuple[Tensor, Tensor]) -> None:
    whole = evaluate(Net(), images, **SETTINGS)
    planned = [(a.attack, a.eps) for a in whole.attacks]
    reasons = set()
    for seconds in itertools.islice(_limits(clock, images), 0, None, 7):
        record = _limited(Net(), images, seconds=seconds)
        complete = _complete(record)
        assert (record.complete, record.verdict.status, complete.outcome) == (False, "suspect", "suspicious")
        assert complete.evidence.startswith("the evaluation ended after its limit of ")
        assert tuple(c.name for c in record.verdict.checks) == NAMES
        assert [(a.attack, a.eps) for a in record.attacks] == planned
        assert record.clean.total == len([r for r in record.ledger if r.attack == "clean"])
        not_run = [a for a in record.attacks if a.not_attacked]
        assert all(a.attacked == 0 for a in not_run[1:])
        if record.clean.total == 30:
            for known, expected in zip(record.worst_case, whole.worst_case, strict=True):
                assert known.robust.count >= expected.robust.count
        if not_run:
            assert "upper bound" in complete.evidence
            attacked = {r.image for r in record.ledger if r.eps == 0.04}
            right = {r.image for r in record.ledger if r.attack == "clean" and r.outcome == "robust"}
            lost = {r.image for r in record.ledger if r.attack != "clean" and r.outcome == "misclassified"}
            assert complete.values["unattacked"] == len(right - lost - attacked)
            reasons.add("attacks" if right - lost <= attacked else "images")
        else:
            assert "checks not made: " in complete.evidence
            reasons.add("checks")
    assert reasons == {"images", "attacks", "checks"}


def test_an_evaluation_without_its_limit_goes_on_where_it_ended(
    clock: Clock, images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    whole = Net()
    expected = _timeless(evaluate(whole, images, **SETTINGS))
    for seconds in itertools.islice(_limits(clock, images), 0, None, 23):
        folder, first, second = tmp_path / f"{seconds}", Net(), Net()
        partial = _limited(first, images, folder, seconds=seconds)
        assert EvaluationRecord.load(folder / "record.json") == partial
        record = evaluate(second, images, out_dir=folder, **SETTINGS)
        assert _timeless(record) == expected
        assert _timeless(EvaluationRecord.load(folder / "record.json")) == expected
        # The first look at the classifier and its views are repeated, and at most one check.
        assert first.calls + second.calls < whole.calls + 60
        assert sorted(p.name for p in folder.iterdir()) == ["record.json", "record.ledger.csv"]


def test_a_limit_that_is_reached_again_and_again_gets_on_each_time(
    images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    expected = _timeless(evaluate(Net(), images, **SETTINGS))
    records = [_limited(Net(), images, tmp_path, seconds=60) for _ in range(12)]
    assert [r.complete for r in records].index(True) > 2
    assert _timeless(records[-1]) == expected


def test_a_limit_that_is_not_reached_changes_nothing(images: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    limited = _limited(Net(), images, tmp_path, seconds=10**6)
    assert _timeless(limited) == _timeless(evaluate(Net(), images, **SETTINGS))
    assert limited.complete
    net = Net()
    assert evaluate(net, images, out_dir=tmp_path, max_minutes=1e-9, **SETTINGS) == limited  # read
    assert net.calls == 1


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_checks_of_an_interrupted_evaluation_are_not_made_again(
    images: tuple[Tensor, Tensor], tmp_path: Path, noise: float
) -> None:
    whole = Net(noise)
    expected = _timeless(evaluate(whole, images, **SETTINGS))
    repeated = []
    for kill_at in range(4, whole.calls + 1, 37):
        first, second, folder = Net(noise), Net(noise), tmp_path / f"{kill_at}"
        first.left = kill_at
        with pytest.raises(KeyboardInterrupt):
            evaluate(first, images, out_dir=folder, **SETTINGS)
        record = evaluate(second, images, out_dir=folder, **SETTINGS)
        assert _timeless(record) == expected
        repeated.append(first.calls + second.calls - whole.calls)
    assert max(repeated) < whole.calls / 5  # those of the check or batch that was interrupted


def test_an_interrupted_evaluation_leaves_a_partial_record(images: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    net = Net()
    evaluate(net, images, **SETTINGS)
    net.left, net.calls = net.calls - 3, 0
    with pytest.raises(KeyboardInterrupt):
        evaluate(net, images, out_dir=tmp_path, **SETTINGS)
    record = EvaluationRecord.load(tmp_path / "record.json")
    assert (record.complete, record.verdict.status) == (False, "suspect")
    assert _complete(record).evidence.startswith("the evaluation ended when it was interrupted; checks not")


def test_a_damaged_file_of_checks_loses_the_checks_after_the_damage(
    images: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    net = Net()
    expected = _timeless(evaluate(net, images, **SETTINGS))
    net.left, net.calls = net.calls - 3, 0
    with pytest.raises(KeyboardInterrupt):
        evaluate(net, images, out_dir=tmp_path, **SETTINGS)
    file = tmp_path / "record.checks.jsonl"
    file.write_bytes(file.read_bytes()[:-20] + b"\xff\n{}\n")
    assert _timeless(evaluate(Net(), images, out_dir=tmp_path, **SETTINGS)) == expected


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf"), "5", True])
def test_an_impossible_limit_is_refused(images: tuple[Tensor, Tensor], minutes: Any) -> None:
    with pytest.raises(InputError, match="max_minutes must be a number above 0"):
        evaluate(Net(), images, max_minutes=minutes, **SETTINGS)
