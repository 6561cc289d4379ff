"""What the processes of a training must agree on: the gate, an epoch's numbers, batch norm's averages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustfpd.processes import Processes


def everywhere(value: Tensor) -> Tensor:
    """The mean of a scalar over all processes, without a graph and the same to the last bit on each; all must call."""
    size = Processes.now().size
    if size == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / size


def averaged(means: dict[str, Any]) -> dict[str, Any]:
    """Means over as many images in each process → means over all; None stays. All must call."""
    told = Processes.now().all(means)
    if len(told) == 1:
        return means
    return {
        name: None if mean is None else sum(other[name] for other in told) / len(told) for name, mean in means.items()
    }


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Give all processes the means of their batch norms' running statistics, which each took of its own images."""
    running = [
        statistic
        for norm in model.modules()
        if isinstance(norm, _BatchNorm)
        for statistic in (norm.running_mean, norm.running_var)
        if statistic is not None
    ]
    average(running)


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Put in the place of each tensor its mean over all processes, in one message; all must call with such tensors."""
    size = Processes.now().size
    if size == 1 or not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for tensor, mean in zip(tensors, torch.split(flat / size, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))
