"""Parameter groups, the optimizer update, and optimizers and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau

from robustfpd.config import OptimizerConfig, ScheduleConfig
from robustfpd.errors import InputError
from robustfpd.models import FPD, Baseline

GROUPS = ("front_and_pyramid", "upscaling", "head")
"""Names of the parameter groups: FPD_FD with the pyramid, the transposed convolutions of FPD_R, the head FPD_LCC."""
GATED_GROUPS = {
    "front_and_restoration": frozenset({"front_and_pyramid", "upscaling"}),
    "upscaling": frozenset({"upscaling"}),
}
"""Groups that step while the gate is shut, by `gate_trains`."""


def parameter_groups(model: FPD | Baseline) -> list[dict[str, Any]]:
    """Return the model's parameters as an optimizer's groups, named after `GROUPS`; a baseline has no upscaling."""
    members: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    upscaling = {id(p) for p in model.decoder.upscale.parameters()} if isinstance(model, FPD) else set()
    head = {id(p) for p in model.head.parameters()}
    for p in model.parameters():
        members["upscaling" if id(p) in upscaling else "head" if id(p) in head else "front_and_pyramid"].append(p)
    return [{"params": params, "name": name} for name, params in members.items() if params]


class Update(Protocol):
    """Clears the gradients, runs the backward pass, clips and steps the optimizer."""

    def __call__(self, loss: Tensor, *, only: frozenset[str] | None = None, retain_graph: bool = False) -> None:
        """Step on `loss`.

        An update that needs its own backward pass, as Fabric's does, has it as a method `backward` as well.

        Args:
            loss: a scalar.
            only: names of the parameter groups that step; None lets all step that the loss reaches.
            retain_graph: keep the loss's graph for a later loss, although the step changes the weights in it.
        """


class OptimizerUpdate:
    """The update by a torch optimizer.

    Args:
        optimizer: built from `parameter_groups(model)`; its groups may be divided further, each under its name.
        clip_grad_norm: largest L2 norm of the gradient of all parameters; None does not clip.
        backward: runs the backward pass of a loss, such as `fabric.backward` or a LightningModule's `manual_backward`.

    Raises:
        InputError: a parameter group has no name, or one that is not in `GROUPS`.
    """

    def __init__(
        self, optimizer: Any, clip_grad_norm: float | None = None, backward: Callable[..., None] = Tensor.backward
    ) -> None:
        self.optimizer, self.clip_grad_norm, self.backward = optimizer, clip_grad_norm, backward
        unknown = {str(group.get("name")) for group in optimizer.param_groups} - set(GROUPS)
        if unknown:
            raise InputError(
                f"the optimizer's parameter groups must be named {', '.join(GROUPS)}, found {', '.join(unknown)}; "
                "build it from robustfpd.training.parameter_groups(model)"
            )

    def __call__(self, loss: Tensor, *, only: frozenset[str] | None = None, retain_graph: bool = False) -> None:
        """Step on `loss`; `Update` describes the arguments."""
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        self.optimizer.zero_grad(set_to_none=True)
        self.compute_gradients(loss, partial=only is not None, retain_graph=retain_graph)
        if self.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm)
        if only is not None:
            # After clipping, which measures all gradients. Without a gradient the optimizer leaves a parameter as it
            # is, with its weight decay and its moments.
            for p in (p for group in groups if group["name"] not in only for p in group["params"]):
                p.grad = None
        # The published phase 2 goes back through phase 1's graph after the weights in it have been stepped, which
        # autograd refuses since torch 1.5 unless the step is hidden from it.
        hidden: Any = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]
        with hidden(tuple(parameters)) if retain_graph else nullcontext():
            self.optimizer.step()

    def compute_gradients(self, loss: Tensor, *, partial: bool, retain_graph: bool) -> None:
        """Run the backward pass; `partial` if the loss does not reach all parameters."""
        self.backward(loss, retain_graph=retain_graph)


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
