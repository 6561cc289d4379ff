"""Random points of the ball: what an attack must beat to be worth its name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustfpd.attacks.base import attack
from robustfpd.attacks.inputs import check_logits
from robustfpd.attacks.norms import lp_ball
from robustfpd.attacks.query_counter import record_queries
from robustfpd.config import Norm
from robustfpd.errors import InputError


@attack("noise", access="decisions")
@torch.no_grad()
def noise(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", samples: int = 20,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Random noise: the first misclassified of `samples` points, by turns in the ball and as far out as it goes.

    Arguments, result and errors as in `pgd`; the last point where none is misclassified.
    """
    assert generator is not None
    if samples < 1:
        raise InputError(f"samples must be at least 1, found {samples}")
    space, best = lp_ball(norm), images.clone()
    standing = torch.arange(len(images), device=images.device)
    queries = torch.zeros(len(images), dtype=torch.long, device=images.device)
    for draw in range(samples):
        x = images[standing]
        delta = space.sample(x, eps, generator)
        if draw % 2:  # to the sphere: most of what a ball of few pixels holds is near its centre
            far = space.normalize(delta) if norm == "linf" else delta / _column(space.norm(delta).clamp_min(1e-12))
            delta = space.project(far * eps, x, eps)
        tried = (x + delta).clamp(0, 1)
        logits = check_logits(classifier(tried), labels[standing])
        queries[standing] += 1
        best[standing] = tried
        standing = standing[logits.argmax(dim=1) == labels[standing]]
        if len(standing) == 0:
            break
    record_queries(classifier, queries)
    return best


def _column(values: Tensor) -> Tensor:
    return values.reshape(-1, 1, 1, 1)  # N 1 1 1
