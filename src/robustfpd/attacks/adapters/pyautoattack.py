"""AutoAttack's black-box and boundary attacks: Square, FAB and targeted FAB.

Andriushchenko et al., ECCV 2020 (Square); Croce & Hein, ICML 2020 (FAB) and "Mind the Box", ICML 2021 (L1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.attacks.adapters.base import ClassifierAdapter, closer, misclassified, search_batch
from robustfpd.attacks.base import attack
from robustfpd.attacks.inputs import num_classes, positive
from robustfpd.attacks.norms import lp_ball
from robustfpd.attacks.query_counter import record_queries
from robustfpd.config import Norm
from robustfpd.errors import InputError

_THEIR_NAMES: dict[str, str] = {"linf": "Linf", "l2": "L2", "l1": "L1"}


@attack("square", access="scores", library="pyautoattack")
def square(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", queries: int = 5000,
    restarts: int = 1, p_init: float = 0.8, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Square Attack: random search with squares of pixels (Andriushchenko et al., ECCV 2020); needs logits only.

    Arguments, result and errors as in `pgd`. Counting classifiers are told the queries of each image.

    Options:
        queries: forward passes per image and restart.
        restarts: random searches per image; an image that has fallen is not attacked again.
        p_init: fraction of the pixels that the first squares cover.
    """
    from pyautoattack.square import SquareAttack

    positive(queries=queries, restarts=restarts)
    if norm != "linf" and min(images.shape[2:]) < 5:
        raise InputError(f"square in {norm} needs images of at least 5×5 pixels, found {tuple(images.shape[2:])}")
    space, classes, best = lp_ball(norm), num_classes(classifier, images, labels), images.clone()
    fallen = misclassified(classifier, images, labels)
    spent = torch.ones(len(images), dtype=torch.long, device=images.device)
    for _ in range(restarts):
        standing = (~fallen).nonzero().flatten()
        if len(standing) == 0:
            break
        x, y = images[standing], labels[standing]
        # One query, the first random stripes, comes before those that theirs counts.
        peer = SquareAttack(
            _Untied(classifier, x, classes), _THEIR_NAMES[norm], queries - 1, eps, p_init, device=images.device
        )
        peer.random_int = _up_to_and_with
        peer.init_hyperparam(x.float())
        used, found = peer.attack_single_run(x.float(), y)
        delta = (found.to(x) - x).nan_to_num(0, 0, 0)
        best[standing] = (x + space.project(delta, x, eps)).clamp(0, 1)
        spent[standing] += used.long()
        fallen[standing] = misclassified(classifier, best[standing], y)
    record_queries(classifier, spent)
    return best


@attack("fab", minimal=True, library="pyautoattack")
def fab(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 100,
    restarts: int = 1, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Fast Adaptive Boundary attack (Croce & Hein, ICML 2020): smallest perturbation over all classes at once.

    Holds N×K×C×H×W gradients; with many classes take `fab_t`. Arguments, result and errors as in `pgd`.

    Options:
        steps: linearisations per start, each K backward passes.
        restarts: starts per image, the first from the image itself, others from up to eps/2 around it.
    """
    return _fab(classifier, images, labels, eps, norm, steps, restarts, targeted=False)


@attack("fab-t", minimal=True, library="pyautoattack")
def fab_t(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", steps: int = 100,
    restarts: int = 1, targets: int = 9, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Targeted FAB (Croce & Hein, ICML 2020): one class after the other, likeliest first; cheap with many classes.

    Arguments, result and errors as in `pgd`.

    Options:
        steps: linearisations per start and target, each one backward pass.
        restarts: starts per image and target, the first from the image itself, others from up to eps/2 around it.
        targets: wrong classes to try; at most K - 1 are.
    """
    positive(targets=targets)
    return _fab(classifier, images, labels, eps, norm, steps, restarts, targeted=True, targets=targets)


def _fab(
    classifier: nn.Module, images: Tensor, labels: Tensor, eps: float, norm: Norm, steps: int, restarts: int, *,
    targeted: bool, targets: int = 1,
) -> Tensor:  # fmt: skip
    """Keep the closest over targets and restarts; their own `perturb` forgets what lies outside eps."""
    from pyautoattack.fab_pt import FABAttack_PT

    positive(steps=steps, restarts=restarts)
    space = lp_ball(norm)

    def search(view: ClassifierAdapter, x: Tensor, y: Tensor) -> Tensor:
        peer = FABAttack_PT(view, _THEIR_NAMES[norm], n_iter=steps, eps=eps, device=x.device)
        best = x.clone()
        # The image's own class is theirs number one.
        for target in range(2, 2 + (min(targets, view.classes - 1) if targeted else 1)):
            peer.target_class = target
            for restart in range(restarts):
                found = peer.attack_single_run(x, y, use_rand_start=restart > 0, is_targeted=targeted)
                best = closer(space, x, best, found)
        return best

    return search_batch(classifier, images, labels, search)


class _Untied(ClassifierAdapter):
    """Logits without ties: Square takes a margin of zero for a success, and saturated logits have many."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        winner = F.one_hot(logits.argmax(dim=1), logits.shape[1])
        return logits + winner * 1e-6 * logits.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)


def _up_to_and_with(low: int, high: int) -> Tensor:
    """Random place of a square; theirs leaves out the highest, so that no square reaches the last row and column."""
    return torch.randint(low, high + 1, (1,))
