"""AutoAttack's boundary attacks from pyautoattack: FAB and targeted FAB.

Croce & Hein, ICML 2020, and "Mind the Box", ICML 2021 (L1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustfpd.attacks.adapters import ClassifierAdapter, closer, minimize_batch
from robustfpd.attacks.base import attack, check_positive
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Norm

LIBRARY_NORMS: dict[str, str] = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@attack("fab", minimal=True, library="pyautoattack")
def fab(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 100,
    restarts: int = 1, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Fast Adaptive Boundary attack: smallest perturbation over all classes at once (Croce & Hein, ICML 2020).

    Holds N×K×C×H×W gradients; with many classes use `fab_t`. Arguments, result and errors as in `pgd`.

    Options:
        steps: linearisations per restart, each K backward passes.
        restarts: starting points per image: the image, then random points within eps/2.
    """
    return _fab(classifier, images, labels, eps, norm, steps, restarts=restarts)


@attack("fab-t", minimal=True, library="pyautoattack")
def fab_t(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 100,
    restarts: int = 1, targets: int = 9, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Targeted FAB: one target class after the other, most likely first (Croce & Hein, ICML 2020).

    Cheap with many classes. Arguments, result and errors as in `pgd`.

    Options:
        steps: linearisations per restart and target, each one backward pass.
        restarts: starting points per image and target, as in `fab`.
        targets: wrong classes to try, at most K - 1.
    """
    check_positive(targets=targets)
    return _fab(classifier, images, labels, eps, norm, steps, restarts=restarts, targets=targets)


def _fab(
    classifier: nn.Module, images: Tensor, labels: Tensor, eps: float, norm: Norm, steps: int, *, restarts: int = 1,
    targets: int | None = None,
) -> Tensor:  # fmt: skip
    """Keep the closest result over targets and restarts; the library's `perturb` discards those outside eps."""
    from pyautoattack.fab_pt import FABAttack_PT

    check_positive(steps=steps, restarts=restarts)
    ball = lp_ball(norm)

    def search(adapter: ClassifierAdapter, x: Tensor, y: Tensor) -> Tensor:
        library_attack = FABAttack_PT(adapter, LIBRARY_NORMS[norm], n_iter=steps, eps=eps, device=x.device)
        best = x.clone()
        # The library counts classes by rank, from 1 for the image's own.
        for rank in range(2, 2 + (1 if targets is None else min(targets, adapter.classes - 1))):
            library_attack.target_class = rank
            for restart in range(restarts):
                candidates = library_attack.attack_single_run(
                    x, y, use_rand_start=restart > 0, is_targeted=targets is not None
                )
                best = closer(ball, x, best, candidates)
        return best

    return minimize_batch(classifier, images, labels, search)
