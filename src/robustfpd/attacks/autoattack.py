"""AutoAttack: the ensemble that leaderboards ask for (Croce & Hein, ICML 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robustfpd.attacks.adapters.pyautoattack import fab_t, square
from robustfpd.attacks.apgd import apgd_ce, apgd_dlr, apgd_t
from robustfpd.attacks.base import attack
from robustfpd.attacks.norms import lp_ball
from robustfpd.attacks.query_counter import record_queries
from robustfpd.config import Norm

EOT_SAMPLES = 20
ROUNDING = 1e-6


@attack("autoattack", library="pyautoattack")
def autoattack(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """AutoAttack `standard`: APGD-CE, targeted APGD, targeted FAB, Square, each on what still stands.

    Arguments, result and errors as in `pgd`; as in AutoAttack, L1 has 5 restarts of APGD-CE and 5 targets of APGD-T.
    """
    first, targets = (5, 5) if norm == "l1" else (1, 9)
    members = [
        lambda x, y: apgd_ce(classifier, x, y, eps=eps, norm=norm, restarts=first, generator=generator),
        lambda x, y: apgd_t(classifier, x, y, eps=eps, norm=norm, targets=targets, generator=generator),
        lambda x, y: fab_t(classifier, x, y, eps=eps, norm=norm, generator=generator),
        lambda x, y: square(classifier, x, y, eps=eps, norm=norm, generator=generator),
    ]
    return _in_turn(classifier, images, labels, eps, norm, members)


@attack("autoattack-rand")
def autoattack_rand(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf",
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """AutoAttack `rand`, for random classifiers: APGD-CE and APGD-DLR with gradients averaged over 20 draws.

    Arguments, result and errors as in `pgd`.
    """
    members = [
        lambda x, y: apgd_ce(classifier, x, y, eps=eps, norm=norm, eot=EOT_SAMPLES, generator=generator),
        lambda x, y: apgd_dlr(classifier, x, y, eps=eps, norm=norm, eot=EOT_SAMPLES, generator=generator),
    ]
    return _in_turn(classifier, images, labels, eps, norm, members)


def _in_turn(
    classifier: nn.Module, images: Tensor, labels: Tensor, eps: float, norm: Norm,
    members: list[Callable[[Tensor, Tensor], Tensor]],
) -> Tensor:  # fmt: skip
    """Run attacks one after the other on the images that still stand; the first one's points where none fall."""
    best, standing = images.clone(), torch.arange(len(images), device=images.device)
    for turn, member in enumerate(members):
        x, y = images[standing], labels[standing]
        found = member(x, y)
        inside = lp_ball(norm).norm(found - x) <= eps * (1 + ROUNDING) + ROUNDING
        with torch.no_grad():
            fell = inside & (classifier(found).argmax(dim=1) != y)
        kept = fell | inside if turn == 0 else fell
        best[standing[kept]] = found[kept]
        standing = standing[~fell]
        if len(standing) == 0:
            break
    record_queries(classifier, None)
    return best
