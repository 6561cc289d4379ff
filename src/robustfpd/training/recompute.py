"""Memory for time: a block's activations are computed again in the backward pass instead of being kept.

Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, through torch's own checkpointing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from robustfpd.models import FPD, Plain


def recompute_blocks(model: FPD | Plain) -> None:
    """Let every block of every stage recompute its activations; weights, gradients and statistics stay the same."""
    for name in model.backbone.stage_names:
        for block in model.backbone.net.get_submodule(name).children():
            if any(True for _ in block.parameters()):
                _recompute(block)


def _recompute(block: nn.Module) -> None:
    forward = block.forward
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]

    def recomputed(*inputs: Any) -> Any:
        if not torch.is_grad_enabled() or not block.training:
            return forward(*inputs)
        return checkpoint(
            forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_held(norms))
        )

    block.forward = recomputed


@contextmanager
def _statistics_held(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Batch norms have taken this batch in already, in the forward pass."""
    before = [(norm, norm.momentum) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in before:
            norm.momentum = momentum
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)
