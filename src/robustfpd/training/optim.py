"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau

from robustfpd.config import OptimizerConfig, ScheduleConfig

# Fused where torch has a fused form: one pass over the memory of each parameter, on CPUs as on GPUs. Its SGD cannot
# start the momentum of some parameters of a group later than that of others, as a shut gate does.
_OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimizerConfig], Optimizer]] = {
    "adam": lambda groups, c: torch.optim.Adam(groups, lr=c.lr, weight_decay=c.weight_decay, fused=True),
    "adamax": lambda groups, c: torch.optim.Adamax(groups, lr=c.lr, weight_decay=c.weight_decay),
    "adamw": lambda groups, c: torch.optim.AdamW(groups, lr=c.lr, weight_decay=c.weight_decay, fused=True),
    "sgd": lambda groups, c: torch.optim.SGD(
        groups, lr=c.lr, weight_decay=c.weight_decay, momentum=c.momentum, fused=c.momentum == 0
    ),
}


def make_optimizer(groups: list[dict[str, Any]], config: OptimizerConfig) -> Optimizer:
    """Return the optimizer named by `config` over parameter groups."""
    return _OPTIMIZERS[config.name](groups, config)


class Schedule:
    """A learning-rate schedule that steps after each batch or after each epoch, whichever `config.name` needs.

    Args:
        optimizer: its learning rate is the schedule's initial one, or the peak of `one_cycle`.
        config: name and parameters of the schedule.
        batches: count of batches in the whole training.
    """

    def __init__(self, optimizer: Optimizer, config: ScheduleConfig, batches: int) -> None:
        self._follows = config.follows
        self._per_epoch = config.name == "plateau"
        self._scheduler: Any = None  # constant learning rate
        if config.name == "plateau":
            mode: Literal["min", "max"] = "max" if config.follows == "accuracy" else "min"
            self._scheduler = ReduceLROnPlateau(optimizer, mode=mode, factor=config.factor, patience=config.patience)
        elif config.name == "cosine":
            self._scheduler = CosineAnnealingLR(optimizer, T_max=batches)
        elif config.name == "one_cycle":
            # One more step than batches: OneCycleLR counts the initial rate as a step.
            # Momentum (Adam's first beta) falls by 0.1 while the rate rises, and rises again.
            lr, high = optimizer.param_groups[0]["lr"], optimizer.param_groups[0].get("momentum", 0.95)
            self._scheduler = OneCycleLR(
                optimizer, max_lr=lr, total_steps=batches + 1, max_momentum=high, base_momentum=max(0.0, high - 0.1)
            )

    def after_batch(self) -> None:
        """Step after a batch."""
        if self._scheduler is not None and not self._per_epoch:
            self._scheduler.step()

    def after_epoch(self, accuracy: float, loss: float) -> None:
        """Step after an epoch with this validation accuracy and loss."""
        if self._per_epoch:
            self._scheduler.step(accuracy if self._follows == "accuracy" else loss)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {} if self._scheduler is None else dict(self._scheduler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of `state_dict()`."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state)
