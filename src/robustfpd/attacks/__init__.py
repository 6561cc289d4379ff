"""Attacks: `attack(classifier, images, labels, *, eps, norm, …)` → adversarial images in [0, 1]."""

from robustfpd.attacks.gradient import bim, fgsm, pgd
from robustfpd.attacks.registry import Attack, get, names

__all__ = ["Attack", "bim", "fgsm", "get", "names", "pgd"]
