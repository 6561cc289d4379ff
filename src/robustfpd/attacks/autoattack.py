"""AutoAttack, the ensemble of standard leaderboards, as its authors publish it (Croce & Hein, ICML 2020; ICML 2021)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from robustfpd.attacks.adapters import ClassifierAdapter, misclassified
from robustfpd.attacks.adapters.pyautoattack import LIBRARY_NORMS
from robustfpd.attacks.base import attack, check_batch_size, num_classes
from robustfpd.config import Norm
from robustfpd.errors import InputError, unknown_name

Version = Literal["standard", "plus", "rand"]
EOT_SAMPLES = 20
"""Samples of version `rand` per gradient."""
LEAST_CLASSES = 4
"""The targeted DLR loss takes the four largest logits."""
LABELS = {
    "apgd-ce": "APGD-CE", "apgd-dlr": "APGD-DLR", "apgd-t": "APGD-T", "fab": "FAB", "fab-t": "FAB-T",
    "square": "Square",
}  # fmt: skip
ITERATIONS = {"apgd-ce": 101, "apgd-dlr": 101, "apgd-t": 909, "fab": 900, "fab-t": 900, "square": 5000}
"""Iterations of each member on a robust image, with one restart and without samples."""
_MEMBERS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}


def restarts_and_targets(norm: Norm) -> tuple[int, int]:
    """Return AutoAttack's restarts of APGD-CE and targets of APGD-T."""
    return (5, 5) if norm == "l1" else (1, 9)


def members_of(version: Version) -> dict[str, str]:
    """Return the attacks of a version in its order, with their names in tables; an unknown version is an InputError."""
    if version not in _MEMBERS:
        raise unknown_name("version of AutoAttack", version, get_args(Version))
    return {member: LABELS[member] for member in _MEMBERS[version]}


@attack("autoattack", library="pyautoattack")
def autoattack(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
    version: Version = "standard", members: Sequence[str] | None = None, seed: int = 0, batch_size: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """AutoAttack by pyautoattack, its authors' code: each attack runs on the images that survived those before it.

    Version `standard` runs APGD-CE, APGD-T, FAB-T and Square; `plus` adds APGD-DLR and FAB, with five restarts; `rand`,
    for random classifiers, runs APGD-CE and APGD-DLR with gradients averaged over 20 samples. With fewer than ten
    classes there are fewer targets. The survivors equal those of
    `AutoAttack(..., seed=seed).run_standard_evaluation(images, labels, batch_size=batch_size)`.

    Arguments, result and errors as in `pgd`.

    Options:
        version: `standard`, `plus` or `rand`.
        members: attacks to run, by the library's names; None runs all of the version.
        seed: seed of every attack and batch, as in the library; `generator` is not used.
        batch_size: images per batch; None takes all. The library seeds every batch alike, so results depend on it.

    Raises:
        InputError: an unknown version or member, or fewer than four classes, for which APGD-T is not defined.
    """
    from pyautoattack import AutoAttack

    check_batch_size(batch_size)
    if version not in _MEMBERS:
        raise unknown_name("version of AutoAttack", version, _MEMBERS)
    chosen = _MEMBERS[version] if members is None else tuple(members)
    for member in chosen:
        if member not in _MEMBERS[version]:
            raise unknown_name(f"member of AutoAttack {version}", member, _MEMBERS[version])
    classes = num_classes(classifier, images, labels)
    if classes < LEAST_CLASSES and "apgd-t" in chosen:
        raise InputError(
            f"AutoAttack's APGD-T needs at least {LEAST_CLASSES} classes, found {classes}; use the suite standard"
        )
    adapter = ClassifierAdapter(classifier, images, classes)
    with _silent_log():
        library: Any = AutoAttack(
            adapter, eps=eps, norm=LIBRARY_NORMS[norm], version=version, seed=seed, device=images.device
        )
        library.attacks_to_run = list(chosen)
        for targeted in (library.apgd_targeted, library.fab):
            targeted.n_target_classes = min(targeted.n_target_classes, classes - 1)
        adversarial, _ = library.run_standard_evaluation(
            images.float(), labels, batch_size=min(batch_size or len(images), len(images))
        )
    result = images.clone()
    found = misclassified(classifier, adversarial.to(images), labels)
    result[found] = adversarial.to(images)[found].clamp(0, 1)
    return result


@contextmanager
def _silent_log() -> Iterator[None]:
    """Silence the library's log: the checks of an evaluation report what it warns of."""
    logger = logging.getLogger("auto-attack")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
