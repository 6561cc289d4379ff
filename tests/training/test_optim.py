from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tests.training.conftest import Batch
from torch import Tensor, nn

from robustfpd.config import OptimizerConfig, ScheduleConfig, parse
from robustfpd.errors import InputError
from robustfpd.models import FPD, Baseline, FPDOutput
from robustfpd.training.metrics import EarlyStopping
from robustfpd.training.optim import GROUPS, OptimizerUpdate, Schedule, make_optimizer, parameter_groups


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


# Parameter groups and update


def test_parameter_groups_separate_front_upscaling_and_head(fpd: FPD, baseline: Baseline) -> None:
    groups = {group["name"]: {id(p) for p in group["params"]} for group in parameter_groups(fpd)}
    assert tuple(groups) == GROUPS
    assert groups["head"] == {id(p) for p in fpd.head.parameters()}
    assert groups["upscaling"] == {id(p) for p in fpd.decoder.upscale.parameters()}
    assert groups["front_and_pyramid"] >= {id(p) for p in fpd.decoder.laterals.parameters()}
    members = [i for group in groups.values() for i in group]
    assert sorted(members) == sorted(id(p) for p in fpd.parameters())
    assert [group["name"] for group in parameter_groups(baseline)] == ["front_and_pyramid", "head"]


def _loss(output: FPDOutput, clean: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, labels) + F.mse_loss(output.restored, clean)


def test_an_update_clips_the_gradient_of_all_groups_before_it_leaves_some_out(fpd: FPD, batch: Batch) -> None:
    clean, noisy, labels = batch
    reference = copy.deepcopy(fpd)
    _loss(reference(noisy), clean, labels).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    torch.optim.SGD(reference.decoder.upscale.parameters(), lr=1.0).step()
    update = OptimizerUpdate(torch.optim.SGD(parameter_groups(fpd), lr=1.0), clip_grad_norm=0.1)
    update(_loss(fpd(noisy), clean, labels), only=frozenset({"upscaling"}))
    for (name, p), expected in zip(fpd.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(p, expected, atol=1e-7), name


def test_an_optimizer_without_named_groups_is_refused(fpd: FPD) -> None:
    with pytest.raises(InputError, match=r"found None; build it from robustfpd\.training\.parameter_groups\(model\)"):
        OptimizerUpdate(torch.optim.SGD(fpd.parameters(), lr=0.1))
