"""Train on single batches of a run to estimate its cost."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from robustfpd.config import RunConfig
from robustfpd.data import ImageSet
from robustfpd.data.image_set import batches
from robustfpd.models import FPD, Baseline
from robustfpd.training.adversarial_step import adversarial_step
from robustfpd.training.optim import OptimizerUpdate, make_optimizer, parameter_groups
from robustfpd.training.perturbations import adversarial_images, noisy_images
from robustfpd.training.steps import backbone_step, baseline_step, two_phase_step


def batch_kinds(run: RunConfig) -> list[tuple[int, int, float]]:
    """Return the kinds of batches of different cost: an epoch and index of such a batch, and their share of all."""
    epochs = run.procedure.epochs
    if run.stage == "adversarial":
        clean = run.adversarial.start_epoch / epochs
        second = 1 / run.training.second_pass_interval if run.adversarial.second_pass else 0.0
        kinds = [(epochs, 0, second * (1 - clean)), (epochs, 1, (1 - second) * (1 - clean)), (0, 0, clean)]
    elif run.model.defence == "fpd":
        alone, one, both = run.training.batch_shares
        kinds = [(0, 0, alone), (epochs, 1, one), (epochs, 0, both)]
    else:
        kinds = [(0, 0, 1.0)]
    return [kind for kind in kinds if kind[2] > 0]


def training_batch(
    model: FPD | Baseline, run: RunConfig, images: ImageSet, device: torch.device, precision: str
) -> Callable[[int, int], None]:
    """Return a function of an epoch and the index of a batch, which trains on that batch."""
    # An open gate is the upper bound: a shut one leaves out phase 2.
    config = run.training.model_copy(update={"threshold": math.inf})
    update = OptimizerUpdate(make_optimizer(parameter_groups(model), run.procedure.optimizer))
    clean, labels = next(batches(images, run.procedure.batch_size, device))
    draws = torch.Generator(device=device)

    def train_batch(epoch: int, index: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            if run.stage == "adversarial":
                adversarial = adversarial_images(model, clean, labels, run.adversarial, epoch, draws)
                adversarial_step(model, clean, adversarial, labels, update, config, run.adversarial, index)
                return
            noisy = noisy_images(model, clean, config, draws)
            if isinstance(model, FPD) and epoch < config.restoration_start * run.training.epochs:
                backbone_step(model, clean, noisy, labels, update, config)
            elif isinstance(model, FPD):
                two_phase_step(model, clean, noisy, labels, update, config, index, draws)
            else:
                baseline_step(model, noisy, labels, update, config)

    return train_batch
