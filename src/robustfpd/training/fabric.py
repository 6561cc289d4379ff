"""Lightning Fabric for a training: one device, or one for each of the processes that torchrun or SLURM started."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from robustfpd.config import Precision, RunConfig
from robustfpd.device import resolve_device, resolve_precision
from robustfpd.distributed import LaunchEnvironment, ProcessGroup
from robustfpd.errors import InputError, first_line
from robustfpd.training.sharding import share_out

_FABRICS = {"fp32": "32-true", "bf16": "bf16-mixed"}
"""Fabric's names of the precisions."""


def launch(config: RunConfig, device: str, precision: Precision, folder: Path) -> Fabric:
    """Return the Fabric of a run, in each of its processes, which have met; `device`, `precision`: as `train` has them.

    Raises:
        InputError: a device or a precision that is not there.
    """
    logger = TensorBoardLogger(root_dir=folder, name="tensorboard", version="")
    environment = LaunchEnvironment.read()
    target = resolve_device(device, environment.world_size)
    options: dict[str, Any] = {"devices": 1 if target.index is None else [target.index]}
    if environment.world_size > 1:
        strategy = _Sharded if config.procedure.strategy == "fsdp" else _Replicated
        options = {
            "devices": environment.local_world_size, "num_nodes": environment.num_nodes, "strategy": strategy(),
            "plugins": [TorchElasticEnvironment()],
        }  # fmt: skip
    try:
        fabric_precision: Any = _FABRICS[resolve_precision(precision, target)]
        fabric = Fabric(accelerator=target.type, precision=fabric_precision, loggers=logger, **options)
        fabric.launch()
    except InputError:
        raise
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"device {device!r} with precision {precision!r} cannot be used here: {first_line(error)}"
        ) from None
    return fabric


def check(config: RunConfig, environment: LaunchEnvironment) -> None:
    """Refuse settings that several processes cannot keep."""
    settings = config.procedure
    stage = "adversarial" if config.stage == "adversarial" else "training"
    # Each process needs as much of the clean half of a batch as of the adversarial one.
    halves = stage == "adversarial" and config.adversarial.batch == "halves"
    parts = environment.world_size * (2 if halves else 1)
    if settings.batch_size % parts:
        near = max(parts, settings.batch_size // parts * parts)
        why = f"{environment.world_size} processes" + (" with halves of their own" if halves else "")
        raise InputError(
            f"{stage}.batch_size is what all processes share, and must be a multiple of {parts} for {why}, found "
            f"{settings.batch_size}; give {stage}.batch_size={near}"
        )
    through = config.training.second_pass == "through" and (stage == "training" or config.adversarial.second_pass)
    if settings.strategy == "fsdp" and through:
        raise InputError(
            "training.second_pass=through goes back through weights that fsdp has shared out again; take "
            f"{stage}.strategy=ddp, or training.second_pass=detached"
        )


class GradientsTogether(DistributedDataParallel):
    """Torch's DDP, told of each backward pass, all of which go through `backward`.

    By itself DDP concludes from forward passes which gradients will come. That goes wrong here: a shut gate leaves out
    the head, `joint` runs two forward passes before one backward pass, `through` goes back through one graph twice.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, gradient_as_bucket_view=True, **options)
        self.complete = False
        """Whether losses that mean all parameters do reach all."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run the module alone; nothing is sent around."""
        return self.module(*inputs, **options)

    def backward(self, run: Callable[[], None], *, partial: bool) -> None:
        """Average over the processes the gradients that `run` adds to none; `partial` if some get none.

        As soon as it is known that all get one, they travel while the rest is computed.
        """
        if self.complete and not partial:
            self.reducer._rebuild_buckets()
            self.reducer.prepare_for_backward([])
            run()
            return
        run()
        trained = [p for p in self.module.parameters() if p.requires_grad]
        gradients = [p.grad for p in trained if p.grad is not None]
        ProcessGroup.current().all_reduce_mean_(gradients)
        self.complete = self.complete or len(gradients) == len(trained)


def replicated(model: nn.Module) -> GradientsTogether | None:
    """What averages the gradients of a model that Fabric set up; None where nothing, or Fabric itself, does."""
    return next((m for m in model.modules() if isinstance(m, GradientsTogether)), None)


class _Replicated(DDPStrategy):
    """Fabric's DDP, by `GradientsTogether`."""

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """Wrap the model; weights and buffers become those of process 0."""
        devices = self._determine_ddp_device_ids()
        # As Fabric does, on a stream beside the default one.
        with torch.cuda.stream(torch.cuda.Stream()) if devices is not None else nullcontext():  # type: ignore[no-untyped-call]
            return GradientsTogether(module, device_ids=devices)


class _Sharded(_Replicated):
    """FSDP: torch's `fully_shard`, in place, with the whole model as one unit.

    Not Fabric's own FSDP strategy, which refuses CPUs and loses parameters that a shut gate leaves without gradient.
    One unit: smaller ones would have to survive a backbone that runs twice in a forward pass and leaves early, and what
    fills memory here are activations, not weights.
    """

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """Share out the weights of the model, which all processes have made alike; they become other parameters."""
        share_out(module, self.root_device)
        return module
