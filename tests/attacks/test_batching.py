from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustfpd.attacks import Attack, apgd_ce, apgd_t, batching, pgd
from robustfpd.attacks.apgd import L1_STAGES
from robustfpd.attacks.base import QueryCounter
from robustfpd.config import NORMS, Norm
from robustfpd.errors import InputError

RADII: dict[str, float] = {"linf": 0.02, "l2": 0.15, "l1": 0.8}
CASES: list[tuple[Attack[Any], dict[str, Any]]] = [
    (pgd, {"steps": 6, "restarts": 2, "early_stop": True}),
    (pgd, {"steps": 6, "restarts": 2}),
    (apgd_ce, {"steps": 9, "restarts": 2}),
    (apgd_t, {"steps": 9, "targets": 2}),
]
NAMES = ["pgd-early", "pgd", "apgd-ce", "apgd-t"]


def _most_passes(attack: Attack[Any], options: dict[str, Any], norm: str) -> int:
    """Passes of an image that stays correctly classified; in L1 APGD evaluates it once more at each radius."""
    starts = 1 if attack is pgd or norm != "l1" else len(L1_STAGES)
    runs = options.get("restarts", 1) * options.get("targets", 1)
    return int(runs * (options["steps"] + starts)) + (attack is not pgd)


class Spy(nn.Module):
    """Record the size of every batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.batches = inner, list[int]()

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        out: Tensor = self.inner(images)
        return out


@pytest.fixture
def many() -> Tensor:
    return (1.2 * torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(2)) - 0.1).clamp(0, 1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("attack", "options"), CASES, ids=NAMES)
def test_the_batch_size_changes_rounding_only(
    net: nn.Module, many: Tensor, attack: Attack[Any], options: dict[str, Any], norm: Norm
) -> None:
    net, x = net.double(), many[:16].double()
    labels = net(x).argmax(1)
    expected = attack(net, x, labels, eps=RADII[norm], norm=norm, **options)
    assert 0 < int((net(expected).argmax(1) != labels).sum()) < len(x)
    passes = set()
    for size in (1, 5, 15):
        counter = QueryCounter(net)
        adversarial = attack(counter, x, labels, eps=RADII[norm], norm=norm, batch_size=size, **options)
        torch.testing.assert_close(adversarial, expected, atol=1e-9, rtol=0)
        passes.add(counter.forward_passes)
    assert len(passes) == 1  # a CPU checks for misclassified images after every pass


@pytest.mark.parametrize(("attack", "options"), CASES[:1] + CASES[2:], ids=NAMES[:1] + NAMES[2:])
def test_waiting_images_replace_misclassified_ones(
    net: nn.Module, many: Tensor, attack: Attack[Any], options: dict[str, Any]
) -> None:
    labels = net(many).argmax(1)
    counts = []
    for size in (None, 5):
        spy = Spy(net)
        attack(spy, many, labels, eps=RADII["linf"], batch_size=size, **options)
        counts.append(spy.batches)
    clean_passes = 0 if attack is pgd else 8  # at the clean images
    assert max(counts[1]) == 5
    batches = counts[1][clean_passes:]
    assert sum(size == 5 for size in batches) > 0.8 * len(batches)
    assert batches.index(min(batches)) > 0.8 * len(batches)  # only the last ones are not full
    assert sum(counts[1]) == sum(counts[0])


@pytest.mark.parametrize(("attack", "options"), CASES, ids=NAMES)
def test_refilled_batches_take_no_more_passes_than_the_options_allow(
    net: nn.Module, many: Tensor, attack: Attack[Any], options: dict[str, Any]
) -> None:
    labels = net(many).argmax(1)
    for norm in NORMS:
        counter = QueryCounter(net)
        attack(counter, many, labels, eps=1e-4, norm=norm, batch_size=7, **options)
        assert counter.forward_passes <= _most_passes(attack, options, norm) * len(many)
        assert counter.backward_passes <= _most_passes(attack, options, norm) * len(many)


@pytest.mark.parametrize(("attack", "options"), CASES, ids=NAMES)
def test_an_images_start_does_not_depend_on_later_images(
    net: nn.Module, many: Tensor, attack: Attack[Any], options: dict[str, Any]
) -> None:
    net, x = net.double(), many.double()
    labels = net(x).argmax(1)
    for norm in NORMS:
        few, all_ = (attack(net, x[:n], labels[:n], eps=RADII[norm], norm=norm, **options)[:9] for n in (9, 40))
        torch.testing.assert_close(few, all_, atol=1e-9, rtol=0)


@pytest.mark.parametrize("attack", [pgd, apgd_ce])
@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_an_invalid_batch_size_is_refused(net: nn.Module, many: Tensor, attack: Attack[Any], size: Any) -> None:
    with pytest.raises(InputError, match="batch_size must be None or a whole number of at least 1, found"):
        attack(net, many, torch.zeros(40, dtype=torch.long), eps=0.1, batch_size=size)


def test_invalid_logits_of_later_images_are_refused(net: nn.Module, many: Tensor) -> None:
    class Broken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            bad = torch.where(images.flatten(1)[:, :1] == 0.5, torch.nan, 0.0)
            out: Tensor = net(images) + bad
            return out

    many[30, :, 0, 0] = 0.5
    labels = torch.zeros(40, dtype=torch.long)
    with pytest.raises(InputError, match="NaN or infinite logits"):
        pgd(Broken(), many, labels, eps=0.1, random_start=False, steps=3, batch_size=6)


@pytest.mark.parametrize(("attack", "options"), CASES, ids=NAMES)
def test_the_sync_interval_of_a_gpu_changes_no_result(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module, many: Tensor, attack: Attack[Any], options: dict[str, Any]
) -> None:
    net, x = net.double(), many.double()
    labels = net(x).argmax(1)
    for norm in NORMS:
        counts, adversarial = [], []
        for interval in (1, 8):
            monkeypatch.setattr(batching, "_sync_interval", lambda device, interval=interval: interval)
            counter = QueryCounter(net)
            adversarial.append(attack(counter, x, labels, eps=RADII[norm], norm=norm, batch_size=11, **options))
            counts.append(counter.forward_passes)
        torch.testing.assert_close(adversarial[0], adversarial[1], atol=1e-9, rtol=0)
        assert counts[0] <= counts[1] <= _most_passes(attack, options, norm) * len(many)
