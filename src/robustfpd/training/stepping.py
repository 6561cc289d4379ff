"""One optimiser step: which parameters move on a loss, and by gradients of what length."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from robustfpd.training.fabric import replicated


class Stepper:
    """The `phases.Update` of real training, on Fabric."""

    def __init__(self, fabric: Fabric, model: Any, optimizer: Any, clip: float | None) -> None:
        """Bind to a model and an optimiser that `fabric.setup` returned; `clip` bounds the gradient's L2 norm."""
        self.fabric, self.model, self.optimizer, self.clip = fabric, model, optimizer, clip
        self.replicated = replicated(model)

    def __call__(self, loss: Tensor, *, only: frozenset[str] | None = None, keep_graph: bool = False) -> None:
        """Step on `loss`, as `phases.Update` says."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.replicated is None:
            self.fabric.backward(loss, retain_graph=keep_graph)
        else:
            run = partial(self.fabric.backward, loss, retain_graph=keep_graph)
            self.replicated.backward(run, partial=only is not None)
        if self.clip is not None:
            # Infinite gradients are reported with the epoch's losses, where a message can say what to do.
            self.fabric.clip_gradients(self.model, self.optimizer, max_norm=self.clip, error_if_nonfinite=False)
        if only is not None:
            leave_out(self.optimizer, only)
        with _moving_unseen(self.model) if keep_graph else nullcontext():
            self.optimizer.step()


def leave_out(optimizer: Optimizer, only: frozenset[str]) -> None:
    """Drop the gradients of all groups but `only`, after clipping, which looks at all of them.

    Without a gradient the optimiser leaves a parameter, its weight decay and its moments as they are.
    """
    for group in optimizer.param_groups:
        if group["name"] not in only:
            for p in group["params"]:
                p.grad = None


def _moving_unseen(model: nn.Module) -> AbstractContextManager[Any]:
    """Let weights move without autograd's notice, as old versions of torch did.

    The published second phase goes back through phase 1's graph after the weights in it have been stepped. Autograd
    refuses that today; only this repeats the published update rule.
    """
    hidden: AbstractContextManager[Any] = torch.autograd._unsafe_preserve_version_counter(  # type: ignore[attr-defined]
        tuple(model.parameters())
    )
    return hidden
