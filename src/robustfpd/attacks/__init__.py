"""Attacks: `attack(classifier, images, labels, *, eps, norm, …)` → adversarial images in [0, 1]."""

from robustfpd.attacks.apgd import apgd_ce, apgd_dlr, apgd_t
from robustfpd.attacks.attack import Attack
from robustfpd.attacks.autoattack import autoattack, autoattack_rand
from robustfpd.attacks.carlini_wagner import cw
from robustfpd.attacks.gradient import bim, fgsm, pgd
from robustfpd.attacks.noise import noise
from robustfpd.attacks.registry import get, names
from robustfpd.attacks.with_art import hopskipjump, jsma, zoo
from robustfpd.attacks.with_foolbox import ddn, deepfool, fmn
from robustfpd.attacks.with_pyautoattack import fab, fab_t, square

__all__ = [
    "Attack", "apgd_ce", "apgd_dlr", "apgd_t", "autoattack", "autoattack_rand", "bim", "cw", "ddn", "deepfool", "fab",
    "fab_t", "fgsm", "fmn", "get", "hopskipjump", "jsma", "names", "noise", "pgd", "square", "zoo",
]  # fmt: skip
