"""A model and an optimiser that FSDP has shared out among processes, and what one process would have of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import broadcast, get_world_size
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from robustfpd.models import FPD, Baseline
from robustfpd.training.perturbations import Perturb


def share_out(model: nn.Module, device: torch.device) -> None:
    """Leave each process its part of every weight; whole ones are there in passes through the model only."""
    for p in model.parameters():
        p.data = p.data.contiguous()  # FSDP takes no weights that lie in the order of channels_last
    for held in (*model.parameters(), *model.buffers()):  # a module of the user's may begin unlike everywhere
        whole = held.data.to(device)
        broadcast(whole, src=0)
        held.data.copy_(whole)
    fully_shard(model, mesh=init_device_mesh(device.type, (get_world_size(),)))


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Let the model have all of its weights for a while, in every process; all must enter.

    Nothing changes for a model that is not shared out.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def with_whole_weights(perturb: Perturb) -> Perturb:
    """Let an attack have all weights: it does not call the model itself, but parts of it."""

    def perturbing(
        model: FPD | Baseline, clean: Tensor, labels: Tensor, epoch: float, draws: torch.Generator
    ) -> Tensor | None:
        with whole_weights(model):
            return perturb(model, clean, labels, epoch, draws)

    return perturbing


def gathered(state: Any) -> Any:
    """A state of nested dicts and lists, with whole tensors in the place of shared-out ones; all must call."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, dict):
        return {key: gathered(value) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    return state


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load whole weights into a model that may be shared out."""
    own = model.state_dict()
    model.load_state_dict({name: _shared_like(own.get(name), value) for name, value in weights.items()})


def load_optimizer_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Take a state of whole tensors, as one process or any number of them saved it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    values = {
        place: {name: _shared_like(parameters[place], value) for name, value in kept.items()}
        for place, kept in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": values})


def _shared_like(parameter: Any, value: Any) -> Any:
    """Share out a value as the parameter is; counts of steps are no such values."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
