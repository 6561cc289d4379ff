"""AutoAttack's black-box and boundary attacks from pyautoattack: Square, FAB and targeted FAB.

Andriushchenko et al., ECCV 2020 (Square); Croce & Hein, ICML 2020 (FAB) and "Mind the Box", ICML 2021 (L1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.attacks.adapters import ClassifierAdapter, closer, minimize_batch, misclassified
from robustfpd.attacks.base import attack, check_positive, num_classes, record_queries
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import Norm
from robustfpd.errors import InputError

LIBRARY_NORMS: dict[str, str] = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@attack("square", access="scores", library="pyautoattack")
def square(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", queries: int = 5000,
    restarts: int = 1, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Square Attack: random search over squares of pixels, by logits alone (Andriushchenko et al., ECCV 2020).

    Arguments, result and errors as in `pgd`. Records the queries per image.

    Options:
        queries: forward passes per image and restart.
        restarts: random searches per image; an image is not attacked again once it is misclassified.
    """
    from pyautoattack.square import SquareAttack

    check_positive(queries=queries, restarts=restarts)
    if norm != "linf" and min(images.shape[2:]) < 5:
        raise InputError(f"square in {norm} needs images of at least 5×5 pixels, found {tuple(images.shape[2:])}")
    ball, classes, result = lp_ball(norm), num_classes(classifier, images, labels), images.clone()
    done = misclassified(classifier, images, labels)
    used = torch.ones(len(images), dtype=torch.long, device=images.device)
    for _ in range(restarts):
        surviving = (~done).nonzero().flatten()
        if len(surviving) == 0:
            break
        x, y = images[surviving], labels[surviving]
        # The library does not count the first query, the random stripes.
        library_attack = SquareAttack(
            _WithoutTies(classifier, x, classes), LIBRARY_NORMS[norm], queries - 1, eps, p_init=0.8,
            device=images.device,
        )  # fmt: skip
        library_attack.random_int = _random_position
        library_attack.init_hyperparam(x.float())
        queries_used, candidates = library_attack.attack_single_run(x.float(), y)
        delta = (candidates.to(x) - x).nan_to_num(0, 0, 0)
        result[surviving] = (x + ball.project(delta, x, eps)).clamp(0, 1)
        used[surviving] += queries_used.long()
        done[surviving] = misclassified(classifier, result[surviving], y)
    record_queries(classifier, used)
    return result


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


class _WithoutTies(ClassifierAdapter):
    """Break ties between logits: Square counts a margin of zero as success, and saturated logits have many ties."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        winner = F.one_hot(logits.argmax(dim=1), logits.shape[1])
        return logits + winner * 1e-6 * logits.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)


def _random_position(low: int, high: int) -> Tensor:
    """Return a square's position, `high` included; the library excludes it and never changes the last row or column."""
    return torch.randint(low, high + 1, (1,))
