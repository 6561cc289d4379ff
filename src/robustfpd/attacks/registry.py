"""Attacks by name."""

from __future__ import annotations

from typing import Any

from robustfpd.attacks.adapters.art import hopskipjump, jsma, zoo
from robustfpd.attacks.adapters.foolbox import ddn, deepfool, fmn
from robustfpd.attacks.adapters.pyautoattack import fab, fab_t, square
from robustfpd.attacks.apgd import apgd_ce, apgd_dlr, apgd_t
from robustfpd.attacks.autoattack import autoattack, autoattack_rand
from robustfpd.attacks.base import Attack
from robustfpd.attacks.carlini_wagner import cw
from robustfpd.attacks.noise import noise
from robustfpd.attacks.pgd import bim, fgsm, pgd
from robustfpd.errors import unknown_name

_ATTACKS: dict[str, Attack[Any]] = {
    a.name: a
    for a in (
        apgd_ce, apgd_dlr, apgd_t, autoattack, autoattack_rand, bim, cw, ddn, deepfool, fab, fab_t, fgsm, fmn,
        hopskipjump, jsma, noise, pgd, square, zoo,
    )
}  # fmt: skip


def names() -> list[str]:
    """Names of all attacks."""
    return sorted(_ATTACKS)


def get(name: str) -> Attack[Any]:
    """Return an attack; an unknown name is an InputError with the nearest ones."""
    if name not in _ATTACKS:
        raise unknown_name("attack", name, _ATTACKS)
    return _ATTACKS[name]
