"""A model on its devices, by Lightning Fabric: device, precision, DDP, synchronised batch norm, checkpointing."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from robustfpd.config import Precision, RunConfig
from robustfpd.device import FrozenStatistics, resolve_device, resolve_precision
from robustfpd.distributed import LaunchEnvironment, ProcessGroup
from robustfpd.errors import InputError, first_line
from robustfpd.models import FPD, Baseline
from robustfpd.models.ops.elu import keep_inputs
from robustfpd.training.optim import OptimizerUpdate


def launch(config: RunConfig, device: str, precision: Precision, folder: Path) -> Fabric:
    """Return this rank's Fabric, which logs to `folder`; the process group is initialised before.

    Raises:
        InputError: an unavailable device or precision, or `sync_batchnorm` on CPUs.
    """
    logger = TensorBoardLogger(root_dir=folder, name="tensorboard", version="")
    environment = LaunchEnvironment.read()
    target = resolve_device(device, environment.world_size)
    options: dict[str, Any] = {"devices": 1 if target.index is None else [target.index]}
    if environment.world_size > 1:
        if config.procedure.sync_batchnorm and target.type != "cuda":
            raise InputError(
                "sync_batchnorm=true needs GPUs: torch has no synchronised batch norm for CPUs; "
                "leave out sync_batchnorm=true, or train in one process"
            )
        options = {
            "devices": environment.local_world_size, "num_nodes": environment.num_nodes, "strategy": _DDPStrategy(),
            "plugins": [TorchElasticEnvironment()],
        }  # fmt: skip
    options["precision"] = {"fp32": "32-true", "bf16": "bf16-mixed"}[resolve_precision(precision, target)]
    try:
        fabric = Fabric(accelerator=target.type, loggers=logger, **options)
        fabric.launch()
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"device {device!r} with precision {precision!r} cannot be used here: {first_line(error)}"
        ) from None
    return fabric


class DDPWithExplicitBackward(DistributedDataParallel):
    """Torch's DDP, prepared for each backward pass by its caller instead of by the forward pass.

    DDP expects one backward pass after each forward pass, with a gradient for every parameter. Here a shut gate gives
    the head none, `joint` makes two forward passes before one backward pass, and `through` goes back through one graph
    twice.
    """

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Call the module, without communication."""
        return self.module(*inputs, **options)

    def prepare_for_backward(self) -> None:
        """Average the gradients over the ranks during the next backward pass, which must reach every parameter."""
        self.reducer._rebuild_buckets()
        self.reducer.prepare_for_backward([])


class _DDPStrategy(DDPStrategy):
    """Fabric's DDP by `DDPWithExplicitBackward`."""

    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """Wrap the model; weights and buffers become those of rank 0."""
        devices = self._determine_ddp_device_ids()
        # As Fabric does, on a stream beside the default one.
        with torch.cuda.stream(torch.cuda.Stream()) if devices is not None else nullcontext():  # type: ignore[no-untyped-call]
            return DDPWithExplicitBackward(module, device_ids=devices, gradient_as_bucket_view=True)


class FabricUpdate(OptimizerUpdate):
    """The update of a model and an optimizer that Fabric set up, on one device or by DDP."""

    def __init__(self, fabric: Fabric, model: nn.Module, optimizer: Any, clip_grad_norm: float | None) -> None:
        super().__init__(optimizer, clip_grad_norm, fabric.backward)
        self.ddp = next((m for m in model.modules() if isinstance(m, DDPWithExplicitBackward)), None)
        self._reaches_all = False  # whether a loss of the whole model gives every parameter a gradient

    def compute_gradients(self, loss: Tensor, *, partial: bool, retain_graph: bool) -> None:
        """Run the backward pass; several ranks average their gradients.

        Communication overlaps with the backward pass, except in the first one and where `partial` leaves parameters
        without a gradient.
        """
        if self.ddp is not None and self._reaches_all and not partial:
            self.ddp.prepare_for_backward()
        super().compute_gradients(loss, partial=partial, retain_graph=retain_graph)
        if self.ddp is not None and (partial or not self._reaches_all):
            trained = [p for p in self.ddp.module.parameters() if p.requires_grad]
            gradients = [p.grad for p in trained if p.grad is not None]
            ProcessGroup.current().all_reduce_mean_(gradients)
            self._reaches_all = self._reaches_all or len(gradients) == len(trained)


def synchronise_batch_norm(model: nn.Module) -> None:
    """Replace each batch norm by one over the batch of all ranks; weights keep their names.

    Raises:
        InputError: a batch norm that overrides `forward`.
    """
    before = dict(model.named_modules())
    for name, module in before.items():
        known = isinstance(module, BatchNormAct2d | nn.SyncBatchNorm) or type(module).forward is _BatchNorm.forward
        if isinstance(module, _BatchNorm) and not known:
            raise InputError(
                f"{name} is a {type(module).__name__}, a batch norm that overrides forward and cannot be synchronised; "
                "leave out sync_batchnorm=true"
            )
    convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    for name, module in model.named_modules():
        # A stage may end in a batch norm: its hook collects the feature map.
        module._forward_hooks.update(before[name]._forward_hooks)


def checkpoint_activations(model: FPD | Baseline) -> None:
    """Recompute the activations of each stage's blocks in the backward pass instead of keeping them.

    Weights, gradients and batch norm statistics stay the same (Chen et al., 2016, arXiv 1604.06174).
    """
    keep_inputs(model)  # the recomputation needs a block's input
    for name in model.backbone.stage_names:
        for block in model.backbone.net.get_submodule(name).children():
            if any(True for _ in block.parameters()):
                _checkpoint_block(block)


def _checkpoint_block(block: nn.Module) -> None:
    forward = block.forward
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]

    def checkpointed(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        # Dense blocks pass a list that grows later: the recomputation needs its present length.
        copies = [list(i) if isinstance(i, list) else i for i in inputs]
        contexts = lambda: (nullcontext(), FrozenStatistics(norms))  # noqa: E731
        return checkpoint(forward, *copies, use_reentrant=False, context_fn=contexts, **options)

    block.forward = checkpointed
