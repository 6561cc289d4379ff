"""Batch norm over the batch of all processes.

On GPUs by torch's own kernels. Those do not run on CPUs: there statistics are taken by torch's batch norm and merged
after Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules._functions import SyncBatchNorm as _OnGpu
from torch.nn.modules.batchnorm import _BatchNorm

from robustfpd.errors import InputError


def synchronise(model: nn.Module) -> None:
    """Let every batch norm in training mode take the statistics of all processes' images.

    The modules stay what they are, so that weights keep their names and a saved model knows nothing of it.

    Raises:
        InputError: a batch norm with a forward pass of its own.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            if not isinstance(module, BatchNormAct2d) and type(module).forward is not _BatchNorm.forward:
                raise InputError(
                    f"{name} is a {type(module).__name__}, a batch norm whose forward pass is its own and cannot be "
                    "synchronised; leave out sync_batchnorm=true"
                )
            module.forward = _synchronised(module)  # type: ignore[method-assign, assignment]


def _synchronised(norm: _BatchNorm) -> Callable[[Tensor], Tensor]:
    alone = norm.forward

    def forward(x: Tensor) -> Tensor:
        if not norm.training:
            out: Tensor = alone(x)
            return out
        norm._check_input_dim(x)  # type: ignore[no-untyped-call]
        share = 0.0 if norm.momentum is None else norm.momentum
        if norm.track_running_stats and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:
                share = 1.0 / float(norm.num_batches_tracked)
        running = (norm.running_mean, norm.running_var) if norm.track_running_stats else (None, None)
        if x.device.type == "cpu":
            y: Tensor = _OnCpu.apply(x, norm.weight, norm.bias, *running, norm.eps, share)
        else:
            group = dist.group.WORLD
            y = _OnGpu.apply(x, norm.weight, norm.bias, *running, norm.eps, share, group, dist.get_world_size())
        return norm.act(norm.drop(y)) if isinstance(norm, BatchNormAct2d) else y

    return forward


class _OnCpu(torch.autograd.Function):
    """Batch norm of all processes' images. Gradients of weight and bias are those of the process's own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
        running_var: Tensor | None, eps: float, momentum: float,
    ) -> Tensor:  # fmt: skip
        precise = _precise(x)
        mean, variance, count = _merged(*torch.batch_norm_update_stats(precise, None, None, 0.0), x)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps, ctx.count, ctx.has_bias = eps, count, bias is not None
        return F.batch_norm(precise, mean, variance, weight, bias, training=False, eps=eps).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        # As in evaluation: the slope at fixed statistics, and the sums Σ dy·x̂ and Σ dy of the own images.
        slope, along, total = torch.ops.aten.native_batch_norm_backward(
            _precise(gradients[0]), _precise(x), weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([along, total])
        dist.all_reduce(sums)
        scale = (variance + ctx.eps).rsqrt()
        pull = sums[0] / ctx.count * scale  # of the statistics, which moved with x
        if weight is not None:
            scale = scale * weight
        shape = (1, -1, *[1] * (x.ndim - 2))
        slope.sub_((_precise(x) - mean.view(shape)).mul_((scale * pull).view(shape)))
        slope.sub_((scale * sums[1] / ctx.count).view(shape))
        own = (along if weight is not None else None, total if ctx.has_bias else None)
        return (slope.to(x.dtype), *own, None, None, None, None)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _merged(mean: Tensor, variance: Tensor, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean, variance (of the population) and count per channel over all processes, from those of each."""
    count = x.numel() // x.shape[1]
    mine = torch.cat([mean, variance, mean.new_tensor([count])])
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    parts = torch.stack(found).double()  # processes, 2C + 1
    means, variances, counts = parts.tensor_split([len(mean), 2 * len(mean)], dim=1)
    whole = counts.sum()
    centre = (counts * means).sum(dim=0) / whole
    spread = (counts * (variances + (means - centre).square())).sum(dim=0) / whole
    return centre.to(mean.dtype), spread.to(mean.dtype), int(whole)
