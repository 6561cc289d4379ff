"""A network with its optimizer and one random batch, for timing and measuring training steps."""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from benchmarks.sizes import NetworkSize
from robustfpd.config import ModelConfig, TaskConfig, TrainingConfig
from robustfpd.models import FPD, build
from robustfpd.rng import generator
from robustfpd.training.fabric import FabricUpdate
from robustfpd.training.optim import make_optimizer
from robustfpd.training.steps import StepResult, baseline_step, parameter_groups, two_phase_step

OPEN = TrainingConfig.model_validate({"threshold": 1e30, "optimizer": {"name": "adam", "lr": 1e-4}})
"""The gate is always open: both phases run in every step."""
JOINT = OPEN.model_copy(update={"second_pass": "joint"})
VARIANTS = {"baseline": ("none", OPEN), "two-phase": ("fpd", OPEN), "joint": ("fpd", JOINT)}
"""Kinds of training steps: defence and settings."""


class TrainableNetwork:
    """A network with its optimizer, and one batch that it is trained on repeatedly."""

    def __init__(self, size: NetworkSize, defence: str, device: torch.device) -> None:
        """Build an FPD (`defence="fpd"`) or its baseline (`"none"`)."""
        task = TaskConfig(num_classes=10, in_channels=size.channels, image_size=(size.size, size.size))
        config = ModelConfig(backbone=size.backbone, pyramid_channels=size.pyramid_channels)
        fabric = Fabric(accelerator=device.type, devices=1 if device.index is None else [device.index])
        self.module = build(task, config if defence == "fpd" else config.baseline())
        self.model, optimizer = fabric.setup(self.module, make_optimizer(parameter_groups(self.module), OPEN.optimizer))
        self.update = FabricUpdate(fabric, self.model, optimizer, OPEN.clip_grad_norm)
        self.images, self.noisy, self.labels = (t.to(device) for t in random_batch(size))

    def step(self, config: TrainingConfig = OPEN, dtype: torch.dtype = torch.float32) -> StepResult:
        """Run one training step; `dtype` other than float32 runs it under autocast."""
        with torch.autocast(self.images.device.type, dtype, enabled=dtype != torch.float32):
            if isinstance(self.module, FPD):
                return two_phase_step(self.model, self.images, self.noisy, self.labels, self.update, config)
            return baseline_step(self.model, self.noisy, self.labels, self.update, config)

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
    noisy = images + OPEN.noise * (2 * torch.rand(shape, generator=draws) - 1)
    return images, noisy, torch.randint(0, 10, (size.batch,), generator=draws)
