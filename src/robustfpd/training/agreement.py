"""What the processes of a training must agree on: the gate, an epoch's numbers, batch norm's averages."""

from __future__ import annotations

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
    size = Processes.now().size
    running = [
        statistic
        for norm in model.modules()
        if isinstance(norm, _BatchNorm)
        for statistic in (norm.running_mean, norm.running_var)
        if statistic is not None
    ]
    if size == 1 or not running:
        return
    flat = torch.cat([statistic.flatten() for statistic in running])
    dist.all_reduce(flat)
    for statistic, mean in zip(running, torch.split(flat / size, [s.numel() for s in running]), strict=True):
        statistic.copy_(mean.view_as(statistic))
