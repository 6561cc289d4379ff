"""Two-phase and adversarial training of an FPD and its undefended baseline."""

from robustfpd.training.adversarial_step import adversarial_step
from robustfpd.training.loop import train
from robustfpd.training.metrics import EpochMetrics, Observer, Progress, TrainResult
from robustfpd.training.optim import OptimizerUpdate, Update, parameter_groups
from robustfpd.training.perturbations import adversarial_images, noisy_images
from robustfpd.training.run_folder import RunFolder
from robustfpd.training.steps import (
    PassLosses,
    StepResult,
    backbone_step,
    baseline_step,
    pass_losses,
    phase_one_loss,
    phase_two_loss,
    restoration_unit,
    two_phase_step,
)

__all__ = [
    "EpochMetrics",
    "Observer",
    "OptimizerUpdate",
    "PassLosses",
    "Progress",
    "RunFolder",
    "StepResult",
    "TrainResult",
    "Update",
    "adversarial_images",
    "adversarial_step",
    "backbone_step",
    "baseline_step",
    "noisy_images",
    "parameter_groups",
    "pass_losses",
    "phase_one_loss",
    "phase_two_loss",
    "restoration_unit",
    "train",
    "two_phase_step",
]  # fmt: skip
