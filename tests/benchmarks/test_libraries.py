from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.attacks import compare
from benchmarks.libraries import LIBRARIES, ROBUSTFPD, AttackCase, bare_passes
from benchmarks.timing import RoundLimits
from robustfpd.attacks.base import QueryCounter

ATTACKS = [
    (name, attack)
    for name, library in LIBRARIES.items()
    for attack in library.attacks
    if importlib.util.find_spec(library.package) is not None
]


class Halves(nn.Module):
    """Classifies which half of an image is brighter; a perturbation of `eps` changes the difference by 2 eps."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(5.0), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        means = torch.stack([half.flatten(1).mean(dim=1) for half in images.chunk(2, dim=3)], dim=1)
        return self.scale * means


@pytest.fixture
def case() -> AttackCase:
    images = torch.full((6, 1, 4, 4), 0.5)
    images[:, :, :, :2] += torch.tensor([0.02, 0.04, 0.06, 0.3, 0.4, 0.45]).reshape(6, 1, 1, 1)
    labels = torch.zeros(6, dtype=torch.long)
    return AttackCase(Halves().eval(), images, labels, 0.05, "linf", 5, 0.02, 2)


def _counted(case: AttackCase) -> tuple[QueryCounter, AttackCase]:
    counter = QueryCounter(case.classifier)
    counter.eval()
    return counter, replace(case, classifier=counter)


@pytest.mark.parametrize(("name", "attack"), ATTACKS)
def test_a_library_finds_the_adversarial_examples_within_eps(name: str, attack: str, case: AttackCase) -> None:
    torch.manual_seed(0)
    adversarial = LIBRARIES[name].attacks[attack](case)()
    assert (case.classifier(adversarial).argmax(dim=1) == 0).tolist() == [False, False, False, True, True, True]
    assert float((adversarial - case.images).abs().max()) <= case.eps + 1e-6
    assert 0 <= float(adversarial.min()) <= float(adversarial.max()) <= 1


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS if attack == "pgd"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_pgd_makes_the_same_number_of_steps(name: str, norm: Any, case: AttackCase) -> None:
    for prepare in (LIBRARIES[name].attacks["pgd"], ROBUSTFPD["pgd"]):
        counter, counted = _counted(replace(case, norm=norm))
        run = prepare(counted)
        counter.reset()
        run()
        assert counter.backward_passes == case.steps * len(case.images)
        assert case.steps <= counter.forward_passes / len(case.images) <= case.steps + 2


def test_bare_passes_are_as_many_as_requested(case: AttackCase) -> None:
    counter, counted = _counted(case)
    bare_passes(counted, forward=5, backward=4)()
    assert (counter.forward_passes, counter.backward_passes) == (30, 24)


def test_missing_libraries_are_listed_with_the_reason(case: AttackCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    workload = compare("pgd", case, RoundLimits(3, 1), "PGD")
    entries = {entry.name: entry for entry in workload.entries}
    assert {name: e.missing for name, e in entries.items() if e.missing} == {
        "torchattacks": "not installed", "foolbox": "not installed", "ART": "not installed", "pyautoattack": "has none",
    }  # fmt: skip
    assert entries["robustfpd"].accuracy == 0.5
    assert entries["bare passes"].accuracy is None
    assert (entries["bare passes"].forward, entries["bare passes"].backward) == (6, 5)
    assert [measure.what for measure in workload.measures] == ["ours / bare passes"]
