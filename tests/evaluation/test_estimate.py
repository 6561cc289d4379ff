from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tests.evaluation import defences
from tests.evaluation.conftest import install_suite

from robustfpd import device
from robustfpd.evaluation import estimate as estimates
from robustfpd.evaluation import evaluate, time_limit
from robustfpd.evaluation.estimate import Speed, estimate
from robustfpd.evaluation.suites import AttackSpec

if TYPE_CHECKING:
    from tests.evaluation.conftest import Linear

SPECS = (
    AttackSpec("FGSM", "fgsm"),
    AttackSpec("PGD", "pgd", options={"steps": 5, "early_stop": True}),
    AttackSpec("FMN", "fmn", options={"steps": 5}),
    AttackSpec("Square", "square", options={"queries": 9}, share=1 / 8),
)
RADII = 0.03, 0.06


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "TIMED_SECONDS", 0.01)


def test_the_passes_of_all_images_are_estimated_from_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    install_suite(monkeypatch, *SPECS)
    net, data = defences.plain(), defences.sample(300)
    found = estimate(net, data, num_images=None, suite="ours", eps=RADII)
    record = evaluate(net, data, suite="ours", eps=RADII)
    assert (found.attacked, found.not_reached) == (64, ())
    assert found.forward_passes == pytest.approx(record.forward_passes, rel=0.15)
    assert found.backward_passes == pytest.approx(record.backward_passes, rel=0.15)
    assert [a.spec for a in found.attacks] == list(SPECS)
    for attack in found.attacks:
        attacked = sum(a.attacked for a in record.attacks if a.attack == attack.spec.label)
        assert attack.images == pytest.approx(attacked, rel=0.2)
    assert found.attacks[3].images < 2 * 128  # early stopping: one or two tranches of 64 at each radius
    assert found.seconds == pytest.approx(found.check_seconds + sum(a.seconds for a in found.attacks), rel=0.1)


def test_attacks_that_are_not_reached_count_with_all_their_iterations(
    monkeypatch: pytest.MonkeyPatch, linear: Linear
) -> None:
    images = torch.rand(100, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    install_suite(monkeypatch, *SPECS)
    readings = iter(range(10**6))
    clock = type("Clock", (), {"monotonic": staticmethod(lambda: 2.0 * next(readings))})
    monkeypatch.setattr(time_limit, "time", clock)
    monkeypatch.setattr(estimates, "MINUTES", 1e-3)
    found = estimate(linear, (images, linear(images).argmax(1)), num_images=100, suite="ours", eps=1e-6)
    assert found.not_reached[:4] == tuple(spec.label for spec in SPECS)
    assert "single-step" not in found.not_reached  # the suite has no images for it
    for attack in found.attacks[:3]:
        assert (attack.images, attack.forward_passes) == (100, 100 * attack.spec.iterations)
    assert found.attacks[3].backward_passes == 0
    assert found.seconds > 0


def test_small_batches_take_longer_for_an_image() -> None:
    speed = Speed(fixed=1.0, per_image=0.1, forward=0.1)
    assert speed.ratio(10, 10) == 1
    assert speed.ratio(1, 10) == pytest.approx(1.1 / 0.2)
    assert speed.ratio(10, 1) == pytest.approx(0.2 / 1.1)
