from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.evaluation.conftest import install_suite, make_spy
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.evaluation import evaluate, loop
from robustfpd.evaluation.ledger import LedgerRow, Outcome
from robustfpd.evaluation.loop import SMALLEST_TRANCHE, found_nothing, split_tranches
from robustfpd.evaluation.suites import AttackSpec
from robustfpd.rng import generator

if TYPE_CHECKING:
    from tests.evaluation.conftest import Data, Linear

    Digits = tuple[nn.Module, Tensor, Tensor]


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 130, 1000])
def test_every_image_is_in_one_tranche(count: int) -> None:
    images = torch.arange(count) * 3 + 1
    parts = split_tranches(images, torch.rand(count), torch.Generator().manual_seed(0))
    assert sorted(torch.cat(parts).tolist()) == images.tolist()
    assert all(len(p) == max(SMALLEST_TRANCHE, -(-count // 10)) for p in parts[:-1])


def test_half_of_a_tranche_has_the_largest_margins_and_half_is_drawn() -> None:
    images, margin = torch.arange(1000), torch.rand(1000, generator=torch.Generator().manual_seed(1))
    nearest = margin.argsort(descending=True).tolist()
    firsts = [split_tranches(images, margin, torch.Generator().manual_seed(s))[0].tolist() for s in (0, 0, 1)]
    assert firsts[0] == firsts[1]
    assert firsts[0] != firsts[2]
    for first in firsts:
        assert set(nearest[:48]) <= set(first)
        others = [nearest.index(i) for i in first if nearest.index(i) >= 60]
        assert len(others) > 35
        assert 400 < sum(others) / len(others) < 650  # from all over, not from near


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [(["robust"], True), (["robust", "misclassified"], False), (["robust", "failed"], False), (["failed"], False)],
)
def test_images_are_skipped_only_after_a_tranche_of_robust_ones(outcomes: list[Outcome], expected: bool) -> None:
    fields: dict[str, Any] = {
        "label": 0, "clean_prediction": 0, "attack": "a", "eps": 0.1, "adversarial_prediction": 0, "distance": 0.0,
        "margin": 0.0,
    }  # fmt: skip
    rows = [LedgerRow(image=i, outcome=outcome, **fields) for i, outcome in enumerate(outcomes)]
    assert found_nothing(rows) is expected


class _Succeeds:
    """An attack on linear models that succeeds on given images alone."""

    def __init__(self, succeeds_on: Tensor) -> None:
        self.succeeds_on, self.batches = succeeds_on, list[Tensor]()

    def __call__(self, classifier: Any, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        self.batches.append(images.clone())
        chosen = (images[:, None] == self.succeeds_on[None]).flatten(2).all(2).any(1)
        slope = classifier.classifier.weight.sign().reshape(1, 1, 6, 6)
        out = images.clone()
        out[chosen] -= eps * slope * (2 * labels[chosen] - 1).reshape(-1, 1, 1, 1)
        return out.clamp(0, 1)


def _order(label: str, eps: float, standing: list[int]) -> list[list[int]]:
    """Tranches of images on the places `standing`, none of which an attack has seen yet."""
    draws, images = generator(0, "tranches", label, repr(eps)), torch.tensor(standing)
    return [part.tolist() for part in split_tranches(images, torch.full((len(images),), -torch.inf), draws)]


@pytest.fixture
def many(linear: Linear) -> Data:
    draws = torch.Generator().manual_seed(8)
    images = (1.2 * torch.rand(130, 1, 6, 6, generator=draws) - 0.1).clamp(0, 1)
    return images, linear(images).argmax(1)


@pytest.mark.parametrize(("positions", "attacked"), [([], 64), ([3], 128), ([70], 64), ([3, 70], 130)])
def test_early_stopping_continues_while_tranches_have_adversarial_examples(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data, positions: list[int], attacked: int
) -> None:
    images, _ = many
    order = [i for part in _order("Square", 0.5, list(range(130))) for i in part]
    attack = _Succeeds(images[[order[i] for i in positions]] if positions else images[:0])
    monkeypatch.setitem(attacks._ATTACKS, "square", make_spy(attack))
    install_suite(monkeypatch, AttackSpec("Square", "square", early_stopping=True))
    record = evaluate(linear, many, suite="ours", eps=0.5, batch_size=20)
    (result,) = record.attacks
    assert (result.attacked, result.skipped) == (attacked, 130 - attacked)
    rows = [r for r in record.ledger if r.attack == "Square"]
    assert [r.image for r in rows] == order[:attacked]
    assert [len(b) for b in attack.batches] == (attacked // 64) * [20, 20, 20, 4] + [2] * (attacked == 130)
    assert result.misclassified == len([p for p in positions if p < attacked])
    assert record.worst_case[0].robust.count == 130 - result.misclassified


def test_an_attack_that_fails_on_a_tranche_is_not_stopped(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data
) -> None:
    calls = [0]

    def raises_once(classifier: Any, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        calls[0] += 1
        if calls[0] == 1:
            raise RuntimeError("once")
        return images.clone()

    monkeypatch.setitem(attacks._ATTACKS, "square", make_spy(raises_once))
    install_suite(monkeypatch, AttackSpec("Square", "square", early_stopping=True))
    (result,) = evaluate(linear, many, suite="ours", eps=0.1).attacks
    assert (result.attacked, result.failed, result.skipped) == (128, 64, 2)


def test_every_attack_turns_early_stopping_off(monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data) -> None:
    attack = _Succeeds(many[0][:0])
    monkeypatch.setitem(attacks._ATTACKS, "square", make_spy(attack))
    install_suite(monkeypatch, AttackSpec("Square", "square", early_stopping=True))
    record = evaluate(linear, many, suite="ours", eps=0.1, every_attack=True)
    assert (record.attacks[0].attacked, record.attacks[0].skipped) == (130, 0)
    assert sum(len(b) for b in attack.batches) == 130


def test_a_suspicious_check_turns_early_stopping_off(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data
) -> None:
    attack = _Succeeds(many[0][:0])
    monkeypatch.setitem(attacks._ATTACKS, "square", make_spy(attack))
    install_suite(monkeypatch, AttackSpec("Square", "square", early_stopping=True))
    probabilities = nn.Sequential(linear, nn.Softmax(dim=1)).eval()
    record = evaluate(probabilities, many, suite="ours", eps=0.1)
    assert any(c.name == "squashed-outputs" and c.outcome == "suspicious" for c in record.verdict.checks)
    assert (record.attacks[0].attacked, record.attacks[0].skipped) == (130, 0)


def test_margins_outside_the_ball_do_not_order_the_tranches(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data
) -> None:
    attack = _Succeeds(many[0][:0])
    monkeypatch.setitem(attacks._ATTACKS, "square", make_spy(attack))
    install_suite(monkeypatch, AttackSpec("DeepFool", "deepfool"), AttackSpec("Square", "square", early_stopping=True))
    record = evaluate(linear, many, suite="ours", eps=0.003)
    smallest = [r for r in record.ledger if r.attack == "DeepFool"]
    misclassified = [r.image for r in smallest if r.outcome == "misclassified"]
    assert len(misclassified) < 20
    assert all(r.margin > 0 for r in smallest)
    (first, *_) = _order("Square", 0.003, [i for i in range(130) if i not in misclassified])
    assert [r.image for r in record.ledger if r.attack == "Square"] == first


def test_early_stopping_changes_no_result_of_a_plain_network(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> None:
    net, images, labels = digits
    monkeypatch.setattr(loop, "SMALLEST_TRANCHE", 16)
    records = []
    for early in (True, False):
        install_suite(
            monkeypatch, AttackSpec("FGSM", "fgsm"), AttackSpec("APGD-CE", "apgd-ce", options={"steps": 30}),
            AttackSpec("APGD-T", "apgd-t", options={"steps": 30, "targets": 3}),
            AttackSpec("FAB-T", "fab-t", options={"steps": 10, "targets": 3}, early_stopping=early),
            AttackSpec("Square", "square", options={"queries": 100}, early_stopping=early),
        )  # fmt: skip
        records.append(evaluate(net, (images, labels), suite="ours", eps=0.03))
    with_, without = records
    assert with_.worst_case == without.worst_case
    assert 40 < with_.worst_case[0].robust.count < with_.clean.count
    assert sum(a.skipped for a in with_.attacks) > 0 == sum(a.skipped for a in without.attacks)
    assert with_.forward_passes < without.forward_passes
