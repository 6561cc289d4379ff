"""Optimisers and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from robustfpd.config import OptimizerConfig, ScheduleConfig

_Build = Callable[[Any, OptimizerConfig, bool], Optimizer]
_OPTIMIZERS: dict[str, _Build] = {
    "adam": lambda groups, c, fused: torch.optim.Adam(groups, lr=c.lr, weight_decay=c.weight_decay, fused=fused),
    "adamax": lambda groups, c, fused: torch.optim.Adamax(groups, lr=c.lr, weight_decay=c.weight_decay),
    "adamw": lambda groups, c, fused: torch.optim.AdamW(groups, lr=c.lr, weight_decay=c.weight_decay, fused=fused),
    "sgd": lambda groups, c, fused: torch.optim.SGD(
        groups, lr=c.lr, weight_decay=c.weight_decay, momentum=c.momentum, fused=fused
    ),
}


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    """Return the optimiser over parameter groups.

    Fused where there is such a form, so that each parameter goes through memory once a step, on CPUs as on GPUs; not
    over parameters that FSDP has shared out, whose state would not be what one process goes on with.
    """
    shared_out = any(isinstance(p, DTensor) for group in groups for p in group["params"])
    return _OPTIMIZERS[config.name](groups, config, not shared_out)


class Schedule:
    """A learning-rate schedule, told of every batch and every epoch; it knows which of them it follows."""

    def __init__(self, optimizer: Optimizer, config: ScheduleConfig, batches: int) -> None:
        """Bind to an optimiser for a training of `batches` batches in all."""
        lr = optimizer.param_groups[0]["lr"]
        self._follows = config.follows
        self._per_batch: LRScheduler | None = None
        self._per_epoch: ReduceLROnPlateau | None = None
        if config.name == "plateau":
            mode: Literal["min", "max"] = "max" if config.follows == "accuracy" else "min"
            self._per_epoch = ReduceLROnPlateau(optimizer, mode=mode, factor=config.factor, patience=config.patience)
        elif config.name == "cosine":
            self._per_batch = CosineAnnealingLR(optimizer, T_max=batches)
        elif config.name == "one_cycle":
            # OneCycleLR asks for one step more than it will be given after the last batch.
            # Momentum (Adam's first beta) falls from its value by 0.1 while the rate rises, and comes back.
            high = optimizer.param_groups[0].get("momentum", 0.95)
            self._per_batch = OneCycleLR(
                optimizer, max_lr=lr, total_steps=batches + 1, max_momentum=high, base_momentum=max(0.0, high - 0.1)
            )

    def after_batch(self) -> None:
        """Move on by one batch."""
        if self._per_batch is not None:
            self._per_batch.step()

    def after_epoch(self, accuracy: float, loss: float) -> None:
        """Move on by one epoch, which ended with this validation accuracy and loss."""
        if self._per_epoch is not None:
            self._per_epoch.step(accuracy if self._follows == "accuracy" else loss)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs to go on."""
        scheduler = self._per_batch or self._per_epoch
        return scheduler.state_dict() if scheduler is not None else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state()`."""
        scheduler = self._per_batch or self._per_epoch
        if scheduler is not None:
            scheduler.load_state_dict(state)
