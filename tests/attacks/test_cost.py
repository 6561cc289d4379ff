from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from robustfpd import attacks
from robustfpd.attacks.cost import Victim, most
from robustfpd.attacks.query_counter import QueryCounter
from robustfpd.config import Norm

SHORT: dict[str, dict[str, Any]] = {
    "apgd-ce": {"steps": 7, "restarts": 2, "eot": 2}, "apgd-dlr": {"steps": 7}, "apgd-t": {"steps": 5, "targets": 3},
    "bim": {"steps": 6}, "cw": {"steps": 3}, "ddn": {"steps": 5}, "deepfool": {"steps": 4}, "fab": {"steps": 3},
    "fab-t": {"steps": 3, "targets": 2}, "fgsm": {}, "fmn": {"steps": 5}, "hopskipjump": {"queries": 150},
    "jsma": {"targets": 2}, "noise": {"samples": 9}, "pgd": {"steps": 5, "restarts": 2},
    "square": {"queries": 30, "restarts": 2}, "zoo": {"steps": 3, "binary_search_steps": 2, "coordinates": 5},
}  # fmt: skip
DEAR = {"cw", "jsma"}
"""Their bounds are of searches that seldom go so far."""


class _Steadfast(nn.Module):
    """Sees its image's mean only, and hardly: small perturbations do not turn it, so that attacks go to their ends."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.flatten(1).mean(dim=1, keepdim=True)
        return torch.cat([mean * 0 + 40, mean, mean.square(), -mean], dim=1)


class _Turning(nn.Module):
    """Bright images are of class 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mean = images.flatten(1).mean(dim=1, keepdim=True)
        return torch.cat([0.55 - mean, mean - 0.55, mean - 0.8, mean - 0.9], dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", sorted(SHORT))
def test_no_attack_takes_more_passes_than_are_told(name: str, norm: Norm) -> None:
    attack = attacks.get(name)
    if norm not in attack.norms:
        pytest.skip(f"{name} has no {norm}")
    images, labels = torch.full((2, 1, 5, 5), 0.5), torch.zeros(2, dtype=torch.long)
    told = most(name, Victim(norm, classes=4, pixels=25), SHORT[name])
    for net in (_Steadfast(), _Turning()):
        counted = QueryCounter(net.eval())
        attack(counted, images, labels, eps=0.01, norm=norm, **SHORT[name])
        assert counted.forward_passes <= 2 * told.forward
        assert counted.backward_passes <= 2 * told.backward
        if isinstance(net, _Steadfast) and name not in DEAR:  # a bound that says something
            assert told.forward <= counted.forward_passes / 2 * 1.5 + 10
            assert told.backward <= counted.backward_passes / 2 * 1.5


def test_every_attack_has_a_cost() -> None:
    victim = Victim("l2", classes=10, pixels=784)
    for name in attacks.names():
        told = most(name, victim, {})
        assert told.forward >= 1
        assert (told.backward > 0) == (attacks.get(name).access == "gradients")
    ensemble, members = most("autoattack", victim, {}), ("apgd-ce", "apgd-t", "fab-t", "square")
    assert ensemble.forward == sum(most(m, victim, {}).forward + 1 for m in members)
