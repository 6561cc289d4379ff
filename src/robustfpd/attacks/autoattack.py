"""AutoAttack, the ensemble of standard leaderboards (Croce & Hein, ICML 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustfpd.attacks.adapters.pyautoattack import fab_t, square
from robustfpd.attacks.apgd import apgd_ce, apgd_dlr, apgd_t
from robustfpd.attacks.base import attack, record_queries
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Norm

EOT_SAMPLES = 20
"""Samples of AutoAttack `rand` per gradient."""
TOLERANCE = 1e-6
"""Rounding by which a perturbation may exceed eps."""


def restarts_and_targets(norm: Norm) -> tuple[int, int]:
    """Return AutoAttack's restarts of APGD-CE and targets of APGD-T."""
    return (5, 5) if norm == "l1" else (1, 9)


@attack("autoattack", library="pyautoattack")
def autoattack(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """AutoAttack `standard`: APGD-CE, APGD-T, FAB-T and Square in turn, each on the images that survived the others.

    As in AutoAttack, L1 has 5 restarts of APGD-CE and 5 targets of APGD-T. Arguments, result and errors as in `pgd`.
    """
    restarts, targets = restarts_and_targets(norm)
    members = [
        lambda x, y: apgd_ce(classifier, x, y, eps=eps, norm=norm, restarts=restarts, generator=generator),
        lambda x, y: apgd_t(classifier, x, y, eps=eps, norm=norm, targets=targets, generator=generator),
        lambda x, y: fab_t(classifier, x, y, eps=eps, norm=norm, generator=generator),
        lambda x, y: square(classifier, x, y, eps=eps, norm=norm, generator=generator),
    ]
    return _ensemble(classifier, images, labels, eps, norm, members)


@attack("autoattack-rand")
def autoattack_rand(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """AutoAttack `rand`, for random classifiers: APGD-CE and APGD-DLR with gradients averaged over 20 samples.

    Arguments, result and errors as in `pgd`.
    """
    members = [
        lambda x, y: apgd_ce(classifier, x, y, eps=eps, norm=norm, eot=EOT_SAMPLES, generator=generator),
        lambda x, y: apgd_dlr(classifier, x, y, eps=eps, norm=norm, eot=EOT_SAMPLES, generator=generator),
    ]
    return _ensemble(classifier, images, labels, eps, norm, members)


def _ensemble(
    classifier: nn.Module, images: Tensor, labels: Tensor, eps: float, norm: Norm,
    members: list[Callable[[Tensor, Tensor], Tensor]],
) -> Tensor:  # fmt: skip
    """Run attacks in turn on the surviving images; images that survive all keep the first attack's result."""
    result, surviving = images.clone(), torch.arange(len(images), device=images.device)
    for turn, member in enumerate(members):
        x, y = images[surviving], labels[surviving]
        adversarial = member(x, y)
        inside = lp_ball(norm).norm(adversarial - x) <= eps * (1 + TOLERANCE) + TOLERANCE
        with torch.no_grad():
            success = inside & (classifier(adversarial).argmax(dim=1) != y)
        keep = inside if turn == 0 else success
        result[surviving[keep]] = adversarial[keep]
        surviving = surviving[~success]
        if len(surviving) == 0:
            break
    record_queries(classifier, None)
    return result
