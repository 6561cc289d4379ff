"""A panel of bad defences and honest networks, and the verdict of `evaluate` on each.

The verdict on a bad defence is correct if it is not trusted, or if the attacks succeed all the same: its robust
accuracy is hardly above that of the network without the defence.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch
from tests.evaluation import defences
from tests.evaluation.defences import BAD, HONEST

from robustfpd.evaluation import evaluate

if TYPE_CHECKING:
    from robustfpd.config import Norm
    from robustfpd.evaluation import EvaluationRecord

pytest.importorskip("pyautoattack")

EPS = 0.15
"""At which the network without a defence is not robust."""
COUNT = 60
MARGIN = 0.1
"""By which a defence that the attacks break may raise the robust accuracy."""
FAST = (
    "saturated tanh", "quantised in a module", "logits × 1000", "random resizing", "dropout that stays",
    "NaN off the manifold",
)  # fmt: skip
RADII: tuple[tuple[Norm, float], ...] = (("linf", EPS), ("l2", 0.8), ("l1", 1.5))


def _evaluate(
    classifier: torch.nn.Module, count: int = COUNT, eps: float = EPS, norm: Norm = "linf", seed: int = 0,
    batch: int = 64, suite: str = "standard",
) -> EvaluationRecord:  # fmt: skip
    data = defences.sample(count)
    return evaluate(classifier, data, suite=suite, eps=eps, norm=norm, seed=seed, batch_size=batch)


@functools.cache
def _undefended() -> float:
    return _evaluate(defences.plain()).robust_accuracy


def _flagged(record: EvaluationRecord) -> set[str]:
    return {c.name for c in record.verdict.checks if c.outcome in ("suspicious", "failed")}


@pytest.mark.parametrize("name", FAST)
def test_quick_finds_a_bad_defence(name: str) -> None:
    record = _evaluate(BAD[name].make(defences.plain()), 12, suite="quick")
    assert BAD[name].flag in _flagged(record), record.verdict.reasons
    assert record.verdict.status != "trusted"
    assert all(bool(c.fix) == (c.name in _flagged(record)) for c in record.verdict.checks)


@pytest.mark.slow
@pytest.mark.parametrize("name", BAD)
def test_standard_finds_every_bad_defence(name: str) -> None:
    record = _evaluate(BAD[name].make(defences.plain()))
    correct = record.verdict.status != "trusted" or record.robust_accuracy <= _undefended() + MARGIN
    assert correct, (record.robust_accuracy, record.verdict.checks)
    assert not BAD[name].flag or BAD[name].flag in _flagged(record), record.verdict.reasons


@pytest.mark.slow
def test_honest_networks_classify_and_the_undefended_one_is_not_robust() -> None:
    images, labels = defences.sample(300)
    nets = {name: make() for name, make in HONEST.items()}
    with torch.no_grad():
        clean = {n: float((net(images).argmax(1) == labels).float().mean()) for n, net in nets.items()}
    assert min(clean.values()) > 0.93, clean
    assert _undefended() < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("norm_eps", RADII, ids=[norm for norm, _ in RADII])
@pytest.mark.parametrize("name", HONEST)
def test_honest_networks_are_trusted_in_every_norm(name: str, norm_eps: tuple[Norm, float]) -> None:
    norm, eps = norm_eps
    record = _evaluate(HONEST[name](), eps=eps, norm=norm)
    assert record.verdict.status == "trusted", record.verdict.reasons


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "batch"), [(0, 64), (1, 17), (2, 8)])
def test_an_undefended_network_is_trusted_where_it_is_robust(seed: int, batch: int) -> None:
    record = _evaluate(defences.plain(seed), eps=0.03, seed=seed, batch=batch)
    assert record.robust_accuracy > 0.8
    assert record.verdict.status == "trusted", record.verdict.reasons


@pytest.mark.slow
def test_standard_finds_wrong_gradients_of_a_few_classes() -> None:
    record = _evaluate(defences.PartlyReversed(defences.plain()).eval(), 150, eps=0.12)
    assert record.verdict.status != "trusted"
    assert _flagged(record) & {"gradient-agreement", "black-box"}
