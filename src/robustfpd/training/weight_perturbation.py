"""Adversarial weight perturbation (AWP; Wu et al., NeurIPS 2020, arXiv 2004.05884)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustfpd.device import FrozenStatistics
from robustfpd.distributed import ProcessGroup

EPSILON = 1e-12
"""Added to denominators."""

Perturbation = tuple[nn.Parameter, Tensor]
"""A weight and its perturbation."""


def weight_perturbations(
    model: nn.Module, loss: Callable[[], Tensor], radius: float, backward: Callable[..., None] = Tensor.backward
) -> list[Perturbation]:
    """Return the perturbation γ ‖w‖ ∇L / ‖∇L‖ of each weight w with two or more dimensions (section 4, equation 10).

    Args:
        model: in training mode; its weights and running averages stay the same, its gradients are cleared.
        loss: computes the loss L of the batch from the model.
        radius: γ, relative to the L2 norm of each weight.
        backward: runs the backward pass of a loss, such as `fabric.backward`.
    """
    model.zero_grad()
    # Those of an FPD's front pass are buffers of their own.
    counts = [(b, b.clone()) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    with FrozenStatistics([m for m in model.modules() if isinstance(m, _BatchNorm)]):
        backward(loss())
    for count, before in counts:
        count.copy_(before)
    reached = [(p, p.grad) for p in model.parameters() if p.ndim > 1 and p.grad is not None]
    model.zero_grad()
    ProcessGroup.current().all_reduce_mean_([g for _, g in reached])
    return [(w, radius * w.detach().norm() / (g.norm() + EPSILON) * g) for w, g in reached]


@contextmanager
def perturbed(perturbations: Sequence[Perturbation]) -> Iterator[None]:
    """Add the perturbations within the block and subtract them on exit; optimizer steps in the block persist."""
    with torch.no_grad():
        for weight, perturbation in perturbations:
            weight.add_(perturbation)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, perturbation in perturbations:
                weight.sub_(perturbation)
