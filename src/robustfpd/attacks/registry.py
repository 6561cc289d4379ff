"""Attacks by name."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from robustfpd.attacks.gradient import bim, fgsm, pgd
from robustfpd.config import Norm
from robustfpd.errors import unknown_name


class Attack(Protocol):
    """The one signature of all attacks; further keyword arguments are the attack's own."""

    def __call__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Return adversarial images N×C×H×W in [0, 1]."""


_ATTACKS: dict[str, Attack] = {"bim": bim, "fgsm": fgsm, "pgd": pgd}


def names() -> list[str]:
    """Names of all attacks."""
    return sorted(_ATTACKS)


def get(name: str) -> Attack:
    """Return an attack; an unknown name is an InputError with the nearest ones."""
    if name not in _ATTACKS:
        raise unknown_name("attack", name, _ATTACKS)
    return _ATTACKS[name]
