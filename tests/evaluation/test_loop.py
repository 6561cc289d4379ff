from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.evaluation.conftest import install_suite, make_spy
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.evaluation import evaluate
from robustfpd.evaluation.audit import draw_audit
from robustfpd.evaluation.ledger import Outcome
from robustfpd.evaluation.loop import found_nothing
from robustfpd.evaluation.suites import AttackSpec
from robustfpd.rng import generator

if TYPE_CHECKING:
    from tests.evaluation.conftest import Data, Linear

    Digits = tuple[nn.Module, Tensor, Tensor]

EPS = 0.5
"""At this radius an image in `_Succeeds` is misclassified, and few are under random noise."""


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [(["robust"], True), (["robust", "misclassified"], False), (["robust", "failed"], False), (["failed"], False)],
)
def test_images_are_skipped_only_after_robust_ones(outcomes: list[Outcome], expected: bool) -> None:
    assert found_nothing(outcomes) is expected


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


@pytest.fixture
def many(linear: Linear) -> Data:
    draws = torch.Generator().manual_seed(8)
    images = (1.2 * torch.rand(130, 1, 6, 6, generator=draws) - 0.1).clamp(0, 1)
    return images, linear(images).argmax(1)


def _set_up(monkeypatch: pytest.MonkeyPatch, attack: Any, *, share: float) -> None:
    """Install random noise, which sets the margins, and an attack in place of Square."""
    monkeypatch.setitem(attacks._ATTACKS, "square", make_spy(attack))
    install_suite(
        monkeypatch, AttackSpec("noise", "noise", options={"samples": 1}), AttackSpec("Square", "square", share=share)
    )


def _attacked_by_square(linear: Linear, many: Data) -> tuple[list[int], list[int], list[int]]:
    """Return the survivors of noise by margin, the images that Square attacked in its order, and the audit sample."""
    record = evaluate(linear, many, suite="ours", eps=EPS, batch_size=20)
    by_margin = sorted(
        (r for r in record.ledger if r.attack == "noise" and r.outcome == "robust"), key=lambda r: -r.margin
    )
    order = [r.image for r in by_margin]
    audit = draw_audit(torch.tensor(sorted(order)), generator(0, "audit", repr(EPS))).tolist()
    return order, [r.image for r in record.ledger if r.attack == "Square"], audit


def test_an_attack_with_a_share_attacks_the_nearest_images_and_the_audit(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data
) -> None:
    _set_up(monkeypatch, _Succeeds(many[0][:0]), share=1 / 8)
    order, attacked, audit = _attacked_by_square(linear, many)
    near = order[: -(-len(order) // 8)]
    assert len(order) > 100
    assert set(attacked) == {*near, *audit}
    assert attacked == sorted(attacked)


@pytest.mark.parametrize(("position", "goes_on"), [(0, False), (-1, True)])
def test_an_attack_goes_on_while_the_farther_images_have_adversarial_examples(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data, position: int, goes_on: bool
) -> None:
    _set_up(monkeypatch, _Succeeds(many[0][:0]), share=1 / 8)
    order, _, audit = _attacked_by_square(linear, many)
    near = [i for i in order[: -(-len(order) // 8)] if i not in audit]
    _set_up(monkeypatch, _Succeeds(many[0][[near[position]]]), share=1 / 8)
    _, attacked, _ = _attacked_by_square(linear, many)
    count = -(-len(order) // 8)
    expected = {*order[:count], *audit}
    if goes_on:
        expected |= set([i for i in order if i not in expected][: 2 * count])
    assert set(attacked) == expected


def test_an_adversarial_example_in_the_audit_has_all_images_attacked(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data
) -> None:
    _set_up(monkeypatch, _Succeeds(many[0][:0]), share=1 / 8)
    order, _, audit = _attacked_by_square(linear, many)
    _set_up(monkeypatch, _Succeeds(many[0][[audit[0]]]), share=1 / 8)
    _, attacked, _ = _attacked_by_square(linear, many)
    assert sorted(attacked) == sorted(order)


def test_an_attack_that_fails_goes_on_with_the_other_images(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data
) -> None:
    calls = [0]

    def raises_once(classifier: Any, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        calls[0] += 1
        if calls[0] == 1:
            raise RuntimeError("once")
        return images.clone()

    monkeypatch.setitem(attacks._ATTACKS, "square", make_spy(raises_once))
    install_suite(monkeypatch, AttackSpec("Square", "square", share=1 / 2))
    (result,) = evaluate(linear, many, suite="ours", eps=0.1, batch_size=130).attacks
    first = result.failed
    assert 65 <= first < 70
    assert (result.attacked, result.skipped) == (130, 0)


def test_every_attack_skips_no_image(monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data) -> None:
    attack = _Succeeds(many[0][:0])
    monkeypatch.setitem(attacks._ATTACKS, "square", make_spy(attack))
    install_suite(monkeypatch, AttackSpec("Square", "square", share=1 / 8))
    record = evaluate(linear, many, suite="ours", eps=0.1, every_attack=True)
    assert (record.attacks[0].attacked, record.attacks[0].skipped) == (130, 0)
    assert sum(len(b) for b in attack.batches) == 130


def test_no_image_is_skipped_after_a_suspicious_check(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data
) -> None:
    attack = _Succeeds(many[0][:0])
    monkeypatch.setitem(attacks._ATTACKS, "square", make_spy(attack))
    install_suite(monkeypatch, AttackSpec("Square", "square", share=1 / 8))
    probabilities = nn.Sequential(linear, nn.Softmax(dim=1)).eval()
    record = evaluate(probabilities, many, suite="ours", eps=0.1)
    assert any(c.name == "squashed-outputs" and c.outcome == "suspicious" for c in record.verdict.checks)
    assert (record.attacks[0].attacked, record.attacks[0].skipped) == (130, 0)


def test_margins_outside_the_ball_do_not_order_the_images(
    monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data
) -> None:
    attack = _Succeeds(many[0][:0])
    monkeypatch.setitem(attacks._ATTACKS, "square", make_spy(attack))
    install_suite(monkeypatch, AttackSpec("DeepFool", "deepfool"), AttackSpec("Square", "square", share=1 / 8))
    record = evaluate(linear, many, suite="ours", eps=0.003)
    smallest = [r for r in record.ledger if r.attack == "DeepFool"]
    misclassified = [r.image for r in smallest if r.outcome == "misclassified"]
    assert len(misclassified) < 20
    assert all(r.margin > 0 for r in smallest)
    survivors = [i for i in range(130) if i not in misclassified]
    audit = draw_audit(torch.tensor(survivors), generator(0, "audit", repr(0.003))).tolist()
    attacked = {r.image for r in record.ledger if r.attack == "Square"}
    assert attacked == {*survivors[: -(-len(survivors) // 8)], *audit}  # in the images' order: no margin is known


def test_shares_change_no_result_of_a_plain_network(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> None:
    net, images, labels = digits
    records = []
    for share in (1 / 8, 1.0):
        install_suite(
            monkeypatch, AttackSpec("FGSM", "fgsm"), AttackSpec("APGD-CE", "apgd-ce", options={"steps": 30}),
            AttackSpec("APGD-T", "apgd-t", options={"steps": 30, "targets": 3}),
            AttackSpec("FAB-T", "fab-t", options={"steps": 10, "targets": 3}, share=share),
            AttackSpec("Square", "square", options={"queries": 100}, share=share),
        )  # fmt: skip
        records.append(evaluate(net, (images, labels), suite="ours", eps=0.03))
    with_, without = records
    assert with_.worst_case[0].robust == without.worst_case[0].robust
    assert with_.worst_case[0].missed_at_most > 0 == without.worst_case[0].missed_at_most
    assert 40 < with_.worst_case[0].robust.count < with_.clean.count
    assert sum(a.skipped for a in with_.attacks) > 0 == sum(a.skipped for a in without.attacks)
    assert with_.forward_passes < without.forward_passes


@pytest.mark.parametrize(("size", "steps", "blocks"), [(6, 40, {12}), (224, 40, {4}), (224, 1000, {1})])
def test_photographs_on_a_cpu_are_attacked_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, size: int, steps: int, blocks: set[int]
) -> None:
    sizes = set()

    def attack(classifier: Any, images: Tensor, labels: Tensor, eps: float) -> Tensor:
        sizes.add(len(images))
        return images.clone()

    monkeypatch.setattr(AttackSpec, "iterations", steps)
    monkeypatch.setitem(attacks._ATTACKS, "square", make_spy(attack))
    install_suite(monkeypatch, AttackSpec("Square", "square"))
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = torch.rand(12, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(12, 3, size, size)
    evaluate(net, (images, net(images).argmax(1)), suite="ours", eps=0.01)
    assert sizes == blocks


def test_every_radius_has_an_audit_of_its_own(monkeypatch: pytest.MonkeyPatch, linear: Linear, many: Data) -> None:
    _set_up(monkeypatch, _Succeeds(many[0][:0]), share=1 / 8)
    record = evaluate(linear, many, suite="ours", eps=[0.0, 0.3, 0.5])
    assert [w.audited for w in record.worst_case] == [0, 4, 4]
    for worst in record.worst_case[1:]:
        assert worst.missed_at_most > 0
        assert worst.interval[0] < worst.robust.low
    attacked = {r.image for r in record.ledger if r.attack == "Square" and r.eps == 0.3}
    survivors = {r.image for r in record.ledger if r.attack == "noise" and r.eps == 0.3 and r.outcome == "robust"}
    audit = draw_audit(torch.tensor(sorted(survivors)), generator(0, "audit", repr(0.3))).tolist()
    assert set(audit) <= attacked < survivors
