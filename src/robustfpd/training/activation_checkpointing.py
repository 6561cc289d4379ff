"""Memory for time: a block's activations are computed again in the backward pass instead of being kept.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, through torch's own checkpointing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from robustfpd.models import FPD, Baseline
from robustfpd.models.ops.elu import keep_inputs


def checkpoint_blocks(model: FPD | Baseline) -> None:
    """Let every block of every stage recompute its activations; weights, gradients and statistics stay the same."""
    keep_inputs(model)  # a block's input is needed again
    for name in model.backbone.stage_names:
        for block in model.backbone.net.get_submodule(name).children():
            if any(True for _ in block.parameters()):
                _recompute(block)


def _recompute(block: nn.Module) -> None:
    forward = block.forward
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]

    def recomputed(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        # Dense blocks pass on a list that grows afterwards: the recomputation needs it as it is now.
        as_now = [list(i) if isinstance(i, list) else i for i in inputs]
        return checkpoint(
            forward, *as_now, use_reentrant=False, context_fn=lambda: (nullcontext(), _StatisticsHeld(norms)), **options
        )

    block.forward = recomputed


class _StatisticsHeld:
    """Batch norms have taken this batch in already, in the forward pass.

    May be entered again: a graph that is kept is recomputed by each backward pass through it.
    """

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        self.norms = norms
        self.momenta: list[float | None] = []

    def __enter__(self) -> None:
        self.momenta = [norm.momentum for norm in self.norms]
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, momentum in zip(self.norms, self.momenta, strict=True):
            norm.momentum = momentum
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)
