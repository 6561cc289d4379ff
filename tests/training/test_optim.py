from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from robustfpd.config import OptimizerConfig, ScheduleConfig, parse
from robustfpd.training.metrics import EarlyStopping
from robustfpd.training.optim import Schedule, make_optimizer


def _optimizer(lr: float = 0.1) -> torch.optim.Optimizer:
    return make_optimizer([{"params": [nn.Parameter(torch.ones(2))]}], OptimizerConfig(name="sgd", lr=lr))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adam", torch.optim.Adam),
        ("adamax", torch.optim.Adamax),
        ("adamw", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
    ],
)
def test_optimizers_by_name(name: str, kind: type) -> None:
    config = parse(OptimizerConfig, {"name": name, "lr": 0.25, "weight_decay": 0.5})
    optimizer = make_optimizer([{"params": [nn.Parameter(torch.ones(2))]}], config)
    assert type(optimizer) is kind
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.25, 0.5)


def _rates(name: str, batches: int = 8) -> list[float]:
    optimizer = _optimizer()
    schedule = Schedule(optimizer, parse(ScheduleConfig, {"name": name}), batches)
    rates = []
    for _ in range(batches):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.after_batch()
    return rates


def test_cosine_follows_the_half_wave() -> None:
    expected = [0.05 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert _rates("cosine") == pytest.approx(expected)


def test_one_cycle_rises_to_the_rate_and_falls() -> None:
    rates = _rates("one_cycle", 40)
    assert max(rates) == pytest.approx(0.1, rel=0.02)
    assert rates[0] < 0.01
    assert rates[-1] < 0.01


def test_constant_stays() -> None:
    assert _rates("constant") == [0.1] * 8


def test_plateau_falls_after_its_patience() -> None:
    optimizer = _optimizer()
    schedule = Schedule(optimizer, ScheduleConfig(name="plateau", patience=1, factor=0.5), 1)
    rates = []
    for accuracy in (0.5, 0.5, 0.5, 0.6, 0.6):
        schedule.after_epoch(accuracy, loss=1.0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.05])


def test_plateau_can_follow_the_loss() -> None:
    optimizer = _optimizer()
    schedule = Schedule(optimizer, ScheduleConfig(name="plateau", patience=1, factor=0.5, follows="loss"), 1)
    rates = []
    for accuracy, loss in ((0.5, 1.0), (0.6, 1.0), (0.7, 1.1), (0.8, 0.9)):
        schedule.after_epoch(accuracy, loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05])


def test_early_stopping_counts_epochs_since_the_best() -> None:
    stopping = EarlyStopping(patience=2)
    seen = [(stopping.better(i, a, loss), stopping.exhausted) for i, (a, loss) in enumerate(
        [(0.5, 1.0), (0.5, 1.0), (0.5, 0.9), (0.4, 0.1), (0.5, 0.9)]
    )]  # fmt: skip
    assert seen == [(True, False), (False, False), (True, False), (False, False), (False, True)]


def test_early_stopping_without_patience_never_stops() -> None:
    stopping = EarlyStopping(patience=None)
    for epoch in range(50):
        stopping.better(epoch, 0.1, 1.0)
    assert not stopping.exhausted


def test_momentum_is_that_of_sgd() -> None:
    group = {"params": [nn.Parameter(torch.ones(2))]}
    optimizer = make_optimizer([group], OptimizerConfig(name="sgd", momentum=0.7))
    assert optimizer.param_groups[0]["momentum"] == 0.7


@pytest.mark.parametrize(("momentum", "low"), [(0.7, 0.6), (0.0, 0.0)])
def test_one_cycle_lowers_the_momentum_it_was_given(momentum: float, low: float) -> None:
    group = {"params": [nn.Parameter(torch.ones(2))]}
    optimizer = make_optimizer([group], OptimizerConfig(name="sgd", momentum=momentum))
    schedule = Schedule(optimizer, ScheduleConfig(name="one_cycle"), 40)
    seen = []
    for _ in range(40):
        seen.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        schedule.after_batch()
    assert seen[0] == pytest.approx(momentum)
    assert max(seen) == pytest.approx(momentum)
    assert min(seen) == pytest.approx(low, abs=0.01)
