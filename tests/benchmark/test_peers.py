from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustfpd.attacks.query_counter import QueryCounter
from robustfpd.benchmark.attacks import compared
from robustfpd.benchmark.peers import OWN, PEERS, Work, floor
from robustfpd.benchmark.timing import Pace

ATTACKS = [
    (name, attack)
    for name, peer in PEERS.items()
    for attack in peer.attacks
    if importlib.util.find_spec(peer.package) is not None
]


class Halves(nn.Module):
    """Which half of an image is brighter; a perturbation of `eps` moves their difference by 2 eps."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        means = torch.stack([half.flatten(1).mean(dim=1) for half in images.chunk(2, dim=3)], dim=1)
        return self.scale * means


@pytest.fixture
def work() -> Work:
    images = torch.full((6, 1, 4, 4), 0.5)
    images[:, :, :, :2] += torch.tensor([0.02, 0.04, 0.06, 0.3, 0.4, 0.45]).reshape(6, 1, 1, 1)
    labels = torch.zeros(6, dtype=torch.long)
    return Work(Halves().eval(), images, labels, 0.05, "linf", 5, 0.02, 2)


def _counted(work: Work) -> tuple[QueryCounter, Work]:
    counted = QueryCounter(work.classifier)
    counted.eval()
    return counted, Work(**{**vars(work), "classifier": counted})


@pytest.mark.parametrize(("name", "attack"), ATTACKS)
def test_a_library_fells_what_can_fall_within_eps_and_nothing_else(name: str, attack: str, work: Work) -> None:
    torch.manual_seed(0)
    found = PEERS[name].attacks[attack](work)()
    assert (work.classifier(found).argmax(dim=1) == 0).tolist() == [False, False, False, True, True, True]
    assert float((found - work.images).abs().max()) <= work.eps + 1e-6
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS if attack == "pgd"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_pgd_takes_the_same_steps(name: str, norm: Any, work: Work) -> None:
    asked = Work(**{**vars(work), "norm": norm})
    for attack in (PEERS[name].attacks["pgd"], OWN["pgd"]):
        counted, seen = _counted(asked)
        run = attack(seen)
        counted.reset()
        run()
        assert counted.backward_passes == work.steps * len(work.images)
        assert work.steps <= counted.forward_passes / len(work.images) <= work.steps + 2


def test_the_floor_makes_the_passes_that_it_is_asked_for(work: Work) -> None:
    counted, seen = _counted(work)
    floor(seen, forward=5, backward=4)()
    assert (counted.forward_passes, counted.backward_passes) == (30, 24)


def test_who_is_missing_is_named_and_no_one_wins_by_attacking_less(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = compared("pgd", work, Pace(3, 1), "PGD")
    entries = {entry.name: entry for entry in found.entries}
    assert {name: e.missing for name, e in entries.items() if e.missing} == {
        "torchattacks": "not installed", "foolbox": "not installed", "ART": "not installed", "pyautoattack": "has none",
    }  # fmt: skip
    assert entries["robustfpd"].accuracy == 0.5
    assert entries["bare passes"].accuracy is None
    assert (entries["bare passes"].forward, entries["bare passes"].backward) == (6, 5)
    assert [measure.what for measure in found.measures] == ["ours / bare passes"]
