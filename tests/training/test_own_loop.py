"""The training steps in other loops: plain PyTorch and a LightningModule. tests/test_examples.py runs the example."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from tests.fpds import corrected_training
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from robustfpd.config import AdversarialConfig, TrainingConfig
from robustfpd.models import FPD
from robustfpd.training import (
    OptimizerUpdate,
    adversarial_images,
    adversarial_step,
    parameter_groups,
    two_phase_step,
)

Batch = tuple[Tensor, Tensor, Tensor]


class Defended(lightning.LightningModule):
    """docs/howto/own-training-loop.md shows this module."""

    def __init__(self, model: FPD) -> None:
        super().__init__()
        self.model = model
        self.config = TrainingConfig(noise=0.1, threshold=0.5)
        self.draws = torch.Generator().manual_seed(0)
        self.automatic_optimization = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameter_groups(self.model), lr=1e-3)

    def on_fit_start(self) -> None:
        self.update = OptimizerUpdate(self.optimizers(), clip_grad_norm=10.0, backward=self.manual_backward)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        clean, labels = batch
        noisy = clean + self.config.noise * (2 * torch.rand_like(clean) - 1)
        result = two_phase_step(self.model, clean, noisy, labels, self.update, self.config, index, self.draws)
        self.log("ce", result.first.ce)


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_module_ends_with_the_weights_of_a_plain_loop(fpd: FPD, batch: Batch, tmp_path: Path) -> None:
    clean, _, labels = batch
    loader: Any = DataLoader(TensorDataset(clean, labels), batch_size=3)
    module, plain = Defended(copy.deepcopy(fpd)), fpd
    update = OptimizerUpdate(torch.optim.AdamW(parameter_groups(plain), lr=1e-3), clip_grad_norm=10.0)
    draws = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for index, (images, targets) in enumerate(loader):
        noisy = images + 0.1 * (2 * torch.rand_like(images) - 1)
        two_phase_step(plain, images, noisy, targets, update, module.config, index, draws)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(module, loader)
    for name, weight in module.model.state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name]), name


def test_adversarial_training_in_a_plain_loop_lowers_its_loss(fpd: FPD, batch: Batch, protocol: str) -> None:
    clean, _, labels = batch
    config = TrainingConfig(threshold=1e9) if protocol == "improved" else corrected_training(threshold=1e9)
    settings = AdversarialConfig(eps=0.05, steps=2)
    update = OptimizerUpdate(torch.optim.AdamW(parameter_groups(fpd), lr=3e-3), clip_grad_norm=10.0)
    losses = []
    for index in range(10):
        adversarial = adversarial_images(fpd, clean, labels, settings)
        result = adversarial_step(fpd, clean, adversarial, labels, update, config, settings, index)
        assert result.adversarial is not None
        losses.append(float(result.adversarial.ce))
    assert losses[-1] < losses[0]
