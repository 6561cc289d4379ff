"""Attacks: `attack(classifier, images, labels, *, eps, norm, …)` → adversarial images in [0, 1]."""

from robustfpd.attacks.adapters.art import hopskipjump, jsma, zoo
from robustfpd.attacks.adapters.foolbox import ddn, deepfool, fmn
from robustfpd.attacks.adapters.pyautoattack import fab, fab_t, square
from robustfpd.attacks.apgd import apgd_ce, apgd_dlr, apgd_t
from robustfpd.attacks.autoattack import autoattack, autoattack_rand
from robustfpd.attacks.base import Attack
from robustfpd.attacks.carlini_wagner import cw
from robustfpd.attacks.noise import noise
from robustfpd.attacks.pgd import bim, fgsm, pgd
from robustfpd.attacks.registry import get, names

__all__ = [
    "Attack", "apgd_ce", "apgd_dlr", "apgd_t", "autoattack", "autoattack_rand", "bim", "cw", "ddn", "deepfool", "fab",
    "fab_t", "fgsm", "fmn", "get", "hopskipjump", "jsma", "names", "noise", "pgd", "square", "zoo",
]  # fmt: skip
