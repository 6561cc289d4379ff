"""A panel of bad defences and honest networks: what `evaluate` says of each.

A bad one is judged correctly when it is not trusted, or when the attacks really broke it: hardly more images withstand
than without the defence.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch
from tests.evaluation import defences
from tests.evaluation.defences import BAD, HONEST

import robustfpd as rf

if TYPE_CHECKING:
    from torch import nn

    from robustfpd.config import Norm
    from robustfpd.evaluation import EvaluationRecord

pytest.importorskip("pyautoattack")

EPS = 0.15
"""At which the undefended network falls."""
FEW, MANY = 24, 60
NEARLY = 0.1
"""More of the images may withstand than without the defence, and it counts as broken."""
FAST = (
    "saturated tanh", "logits × 1000", "softmax", "quantised in a module", "jpeg", "detached restoration",
    "sign activations", "random resizing", "functional dropout", "dropout that stays",
)  # fmt: skip
RADII: tuple[tuple[Norm, float], ...] = (("linf", EPS), ("l2", 0.8), ("l1", 1.5))


def _evaluate(
    classifier: nn.Module, count: int, eps: float = EPS, norm: Norm = "linf", seed: int = 0, batch: int = 64
) -> EvaluationRecord:
    data = defences.sample(count)
    return rf.evaluate(classifier, data, suite="standard", eps=eps, norm=norm, seed=seed, batch_size=batch)


@functools.cache
def _undefended(count: int) -> float:
    return _evaluate(defences.plain(), count).robust_accuracy


def _flagged(record: EvaluationRecord) -> set[str]:
    return {c.name for c in record.verdict.checks if c.outcome in ("suspicious", "failed")}


def _rightly_judged(record: EvaluationRecord, undefended: float) -> bool:
    return record.verdict.status != "trusted" or record.robust_accuracy <= undefended + NEARLY


def test_the_honest_networks_classify_and_the_plain_one_falls() -> None:
    images, labels = defences.sample(300)
    nets = {name: make() for name, make in HONEST.items()}
    with torch.no_grad():
        clean = {n: float((net(images).argmax(1) == labels).float().mean()) for n, net in nets.items()}
    assert min(clean.values()) > 0.93, clean
    assert _undefended(FEW) < 0.3


@pytest.mark.parametrize("name", FAST)
def test_a_bad_defence_is_seen_by_its_check(name: str) -> None:
    record = _evaluate(BAD[name].make(defences.plain()), FEW)
    assert BAD[name].flag in _flagged(record), record.verdict.reasons
    assert record.verdict.status != "trusted"


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_every_bad_defence_is_judged_rightly(name: str) -> None:
    record = _evaluate(BAD[name].make(defences.plain()), MANY)
    assert _rightly_judged(record, _undefended(MANY)), (record.robust_accuracy, record.verdict.checks)
    assert not BAD[name].flag or BAD[name].flag in _flagged(record), record.verdict.reasons


@pytest.mark.parametrize("name", ["plain", "PGD-trained"])
def test_an_honest_network_is_trusted(name: str) -> None:
    record = _evaluate(HONEST[name](), FEW)
    assert record.verdict.status == "trusted", record.verdict.reasons


@pytest.mark.slow
@pytest.mark.parametrize("norm_eps", RADII, ids=[norm for norm, _ in RADII])
@pytest.mark.parametrize("name", HONEST)
def test_honest_networks_are_trusted_in_every_norm(name: str, norm_eps: tuple[Norm, float]) -> None:
    norm, eps = norm_eps
    record = _evaluate(HONEST[name](), MANY, eps, norm)
    assert record.verdict.status == "trusted", record.verdict.reasons


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "batch"), [(0, 64), (1, 17), (2, 8)])
def test_a_plain_network_is_trusted_where_it_withstands(seed: int, batch: int) -> None:
    record = _evaluate(defences.plain(seed), MANY, eps=0.03, seed=seed, batch=batch)
    assert record.robust_accuracy > 0.8
    assert record.verdict.status == "trusted", record.verdict.reasons


class _PartlyReversed(torch.nn.Module):
    """True logits, but for two classes a gradient that leads the wrong way."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.net(images)
        masked = logits.argmax(dim=1, keepdim=True) < 2
        return torch.where(masked, 2 * logits.detach() - logits, logits)


def test_gradients_that_are_wrong_for_a_few_classes_are_not_trusted() -> None:
    record = _evaluate(_PartlyReversed(defences.plain()).eval(), 150, eps=0.12)
    assert record.verdict.status != "trusted"
    assert _flagged(record) & {"gradient-agreement", "black-box"}
