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
    """Keeps the size of every batch."""

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
    net, labels = net.double(), net.double()(many.double()).argmax(1)
    whole, counted = attack(net, many.double(), labels, eps=RADII[norm], norm=norm, **options), []
    fell = net(whole).argmax(1) != labels
    assert 0 < int(fell.sum()) < len(many)
    for size in (1, 7, 39):
        counter = QueryCounter(net)
        found = attack(counter, many.double(), labels, eps=RADII[norm], norm=norm, batch_size=size, **options)
        torch.testing.assert_close(found, whole, atol=1e-9, rtol=0)
        counted.append(counter.forward_passes)
    assert len(set(counted)) == 1  # on a CPU nothing waits for a look


@pytest.mark.parametrize(("attack", "options"), CASES[:1] + CASES[2:], ids=NAMES[:1] + NAMES[2:])
def test_waiting_images_take_the_places_of_those_that_fell(
    net: nn.Module, many: Tensor, attack: Attack[Any], options: dict[str, Any]
) -> None:
    labels = net(many).argmax(1)
    counts = []
    for size in (None, 5):
        spy = Spy(net)
        attack(spy, many, labels, eps=RADII["linf"], batch_size=size, **options)
        counts.append(spy.batches)
    looks = 0 if attack is pgd else 8  # at the clean images
    assert max(counts[1]) == 5
    asked = counts[1][looks:]
    assert sum(size == 5 for size in asked) > 0.8 * len(asked)
    assert asked.index(min(asked)) > 0.8 * len(asked)  # only the last ones are not full
    assert sum(counts[1]) == sum(counts[0])


@pytest.mark.parametrize(("attack", "options"), CASES, ids=NAMES)
def test_refilled_batches_take_no_more_passes_than_the_options_allow(
    net: nn.Module, many: Tensor, attack: Attack[Any], options: dict[str, Any]
) -> None:
    labels = net(many).argmax(1)
    for norm in NORMS:
        counted = QueryCounter(net)
        attack(counted, many, labels, eps=1e-4, norm=norm, batch_size=7, **options)
        assert counted.forward_passes <= _most_passes(attack, options, norm) * len(many)
        assert counted.backward_passes <= _most_passes(attack, options, norm) * len(many)


@pytest.mark.parametrize(("attack", "options"), CASES, ids=NAMES)
def test_an_images_start_does_not_depend_on_those_after_it(
    net: nn.Module, many: Tensor, attack: Attack[Any], options: dict[str, Any]
) -> None:
    net, x = net.double(), many.double()
    labels = net(x).argmax(1)
    for norm in NORMS:
        few, all_ = (attack(net, x[:n], labels[:n], eps=RADII[norm], norm=norm, **options)[:9] for n in (9, 40))
        torch.testing.assert_close(few, all_, atol=1e-9, rtol=0)


@pytest.mark.parametrize("attack", [pgd, apgd_ce])
@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_a_batch_size_that_is_none_is_refused(net: nn.Module, many: Tensor, attack: Attack[Any], size: Any) -> None:
    with pytest.raises(InputError, match="batch_size must be None or a whole number of at least 1, found"):
        attack(net, many, torch.zeros(40, dtype=torch.long), eps=0.1, batch_size=size)


def test_answers_that_are_none_are_refused_for_images_that_come_later(net: nn.Module, many: Tensor) -> None:
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
def test_looking_less_often_as_on_a_gpu_changes_no_result(
    monkeypatch: pytest.MonkeyPatch, net: nn.Module, many: Tensor, attack: Attack[Any], options: dict[str, Any]
) -> None:
    net, x = net.double(), many.double()
    labels = net(x).argmax(1)
    for norm in NORMS:
        counts, found = [], []
        for every in (1, 8):
            monkeypatch.setattr(batching, "_sync_interval", lambda device, every=every: every)
            counted = QueryCounter(net)
            found.append(attack(counted, x, labels, eps=RADII[norm], norm=norm, batch_size=11, **options))
            counts.append(counted.forward_passes)
        torch.testing.assert_close(found[0], found[1], atol=1e-9, rtol=0)
        assert counts[0] <= counts[1] <= _most_passes(attack, options, norm) * len(many)
