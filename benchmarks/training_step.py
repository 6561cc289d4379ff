"""A network with its optimizer and one random batch, for timing and measuring training steps."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from benchmarks.sizes import NetworkSize
from robustfpd.config import ModelConfig, TaskConfig, TrainingConfig, parse, protocol_defaults
from robustfpd.models import FPD, build
from robustfpd.rng import generator
from robustfpd.training.fabric import FabricUpdate
from robustfpd.training.optim import make_optimizer, parameter_groups
from robustfpd.training.steps import StepResult, baseline_step, two_phase_step

Kind = Literal["baseline", "improved", "improved, full front", "corrected", "corrected, joint"]
KINDS: dict[Kind, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "baseline": ("improved", {}, {}),
    "improved": ("improved", {}, {}),
    "improved, full front": ("improved", {"front_stages": None}, {}),
    "corrected": ("corrected", {}, {}),
    "corrected, joint": ("corrected", {}, {"second_pass": "joint"}),
}
"""Protocol, and changes of the model's and of the training's settings."""


def training_config(kind: Kind) -> TrainingConfig:
    """Return the settings of a kind of training steps, with the gate always open."""
    protocol, _, changes = KINDS[kind]
    values = {**protocol_defaults(protocol, "training"), "threshold": 1e30, "noise": 0.1, **changes}
    return parse(TrainingConfig, {**values, "optimizer": {"name": "adam", "lr": 1e-4}})


class TrainableNetwork:
    """A network with its optimizer, and one batch that it is trained on repeatedly."""

    def __init__(self, size: NetworkSize, kind: Kind, device: torch.device) -> None:
        """Build an FPD of a protocol, or the baseline."""
        task = TaskConfig(num_classes=10, in_channels=size.channels, image_size=(size.size, size.size))
        protocol, changes, _ = KINDS[kind]
        values = {**protocol_defaults(protocol, "model"), "backbone": size.backbone, **changes}
        if protocol == "corrected":
            values["pyramid_channels"] = size.pyramid_channels
        config = parse(ModelConfig, values)
        self.config, self.draws = training_config(kind), generator(0, "noise", device=device)
        fabric = Fabric(accelerator=device.type, devices=1 if device.index is None else [device.index])
        self.module = build(task, config.baseline() if kind == "baseline" else config)
        self.model, optimizer = fabric.setup(
            self.module, make_optimizer(parameter_groups(self.module), self.config.optimizer)
        )
        self.update = FabricUpdate(fabric, self.model, optimizer, self.config.clip_grad_norm)
        self.images, self.noisy, self.labels = (t.to(device) for t in random_batch(size))

    def step(self, index: int = 0, dtype: torch.dtype = torch.float32) -> StepResult:
        """Train on batch `index` of an epoch: phase 2 follows in the first of `second_pass_interval` batches.

        A `dtype` other than float32 runs the step under autocast.
        """
        batch = (self.images, self.noisy, self.labels)
        with torch.autocast(self.images.device.type, dtype, enabled=dtype != torch.float32):
            if isinstance(self.module, FPD):
                return two_phase_step(self.model, *batch, self.update, self.config, index, self.draws)
            return baseline_step(self.model, *batch[1:], self.update, self.config)

    def calibrate_batch_norms(self) -> None:
        """Set the running statistics to the batch's: with the initial ones, denoising overflows."""
        norms = [m for m in self.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [m.momentum for m in norms]
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # cumulative mean
        self.module.train()
        with torch.no_grad():
            self.module(self.images)
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum


def random_batch(size: NetworkSize) -> tuple[Tensor, Tensor, Tensor]:
    """Return random images N×C×H×W in [0, 1], the same with noise, and labels N."""
    draws, shape = generator(0, "benchmark"), (size.batch, size.channels, size.size, size.size)
    images = torch.rand(shape, generator=draws)
    noisy = images + 0.1 * (2 * torch.rand(shape, generator=draws) - 1)
    return images, noisy, torch.randint(0, 10, (size.batch,), generator=draws)
