"""Random points of the ball, a baseline for all attacks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustfpd.attacks.base import attack, check_counts, check_logits, record_queries
from robustfpd.attacks.norms import lp_ball, per_image
from robustfpd.config import Norm


@attack("noise", access="decisions")
@torch.no_grad()
def noise(
    classifier: nn.Module, images: Tensor, labels: Tensor, *, eps: float, norm: Norm = "linf", samples: int = 20,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Random noise: the first misclassified of `samples` points, by turns uniform in the ball and on its surface.

    Arguments, result and errors as in `pgd`; returns the last point of images for which none is misclassified.
    """
    assert generator is not None  # the decorator's
    check_counts(samples=samples)
    ball, result = lp_ball(norm), images.clone()
    surviving = torch.arange(len(images), device=images.device)
    queries = torch.zeros(len(images), dtype=torch.long, device=images.device)
    for draw in range(samples):
        x = images[surviving]
        delta = ball.sample(x, eps, generator)
        if draw % 2:  # on the surface: in few dimensions most of the ball is near its centre
            length = per_image(ball.norm(delta).clamp_min(1e-12))
            direction = ball.normalize(delta) if norm == "linf" else delta / length
            delta = ball.project(direction * eps, x, eps)
        candidates = (x + delta).clamp(0, 1)
        logits = check_logits(classifier(candidates), labels[surviving])
        queries[surviving] += 1
        result[surviving] = candidates
        surviving = surviving[logits.argmax(dim=1) == labels[surviving]]
        if len(surviving) == 0:
            break
    record_queries(classifier, queries)
    return result
