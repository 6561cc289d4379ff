"""Adversarial attacks: `attack(classifier, images, labels, *, eps, norm, ...)` returns images N×C×H×W in [0, 1]."""

from __future__ import annotations

from typing import Any

from robustfpd.attacks.adapters.art import hopskipjump, jsma, zoo
from robustfpd.attacks.adapters.foolbox import cw, ddn, deepfool, fmn
from robustfpd.attacks.adapters.pyautoattack import fab, fab_t
from robustfpd.attacks.apgd import apgd_ce, apgd_dlr, apgd_t
from robustfpd.attacks.autoattack import autoattack
from robustfpd.attacks.base import Attack
from robustfpd.attacks.pgd import bim, fgsm, noise, pgd
from robustfpd.attacks.square import square
from robustfpd.errors import unknown_name

__all__ = [
    "Attack", "apgd_ce", "apgd_dlr", "apgd_t", "autoattack", "bim", "cw", "ddn", "deepfool", "fab",
    "fab_t", "fgsm", "fmn", "get", "hopskipjump", "jsma", "names", "noise", "pgd", "square", "zoo",
]  # fmt: skip

_ATTACKS: dict[str, Attack[Any]] = {
    "apgd-ce": apgd_ce, "apgd-dlr": apgd_dlr, "apgd-t": apgd_t, "autoattack": autoattack,
    "bim": bim, "cw": cw, "ddn": ddn, "deepfool": deepfool, "fab": fab,
    "fab-t": fab_t, "fgsm": fgsm, "fmn": fmn, "hopskipjump": hopskipjump, "jsma": jsma, "noise": noise, "pgd": pgd,
    "square": square, "zoo": zoo,
}  # fmt: skip


def names() -> list[str]:
    """Return the names of all attacks, sorted."""
    return sorted(_ATTACKS)


def get(name: str) -> Attack[Any]:
    """Return the attack called `name`; raise an InputError with the closest names if it is unknown."""
    if name not in _ATTACKS:
        raise unknown_name("attack", name, _ATTACKS)
    return _ATTACKS[name]
