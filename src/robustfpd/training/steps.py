"""The training steps on noisy images: two-phase and baseline, with their losses and the gate.

The two-phase step of Li et al., CVPR 2020 (arXiv 2005.02552), on images x, labels y and x_noisy = x + U(-ε, ε)::

    Phase 1    ŷ¹, x'¹ = FPD(x_noisy)      L2 = MSE(x'¹, x)
               L2 > T (gate shut):  step on α₂·L2 for FPD_FD and FPD_R only, and stop
               otherwise (open):    step on α₁·CE(ŷ¹, y) + α₂·L2
    Phase 2    ŷ², x'² = FPD(x'¹)          step on α₁·CE(ŷ², y) + α₂'·MSE(x'², x)

For the first `restoration_start` of the epochs, `backbone_step` trains the backbone alone. In both phases, independent
uniform noise (`middle_noise`) is added between the passes: the restoration removes the noise of x_noisy, and a back
pass trained on clean images is not robust.

The functions take any loop's model, batch and optimizer; `robustfpd.training.train` calls the same ones::

    config = TrainingConfig(noise=0.1)
    generator = torch.Generator().manual_seed(0)
    update = OptimizerUpdate(torch.optim.AdamW(parameter_groups(model), lr=1e-3), clip_grad_norm=10.0)
    for index, (clean, labels) in enumerate(loader):
        noisy = noisy_images(model, clean, config, generator)
        result = two_phase_step(model, clean, noisy, labels, update, config, index, generator)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.config import TrainingConfig
from robustfpd.data.transforms import uniform_like
from robustfpd.distributed import ProcessGroup
from robustfpd.errors import InputError
from robustfpd.models import FPDOutput
from robustfpd.training.optim import GATED_GROUPS, Update

# Losses


class PassLosses(NamedTuple):
    """Losses of one forward pass, each a scalar, and its accuracy as a count.

    `ce` is the cross-entropy of the logits, `restoration` L2, the mean squared error between restored and clean images
    (None for a baseline). `correct` of `counted` images are classified correctly.
    """

    ce: Tensor
    restoration: Tensor | None
    correct: Tensor
    counted: int

    def detach(self) -> PassLosses:
        """Return the losses without their graphs."""
        restoration = None if self.restoration is None else self.restoration.detach()
        return self._replace(ce=self.ce.detach(), restoration=restoration)


def pass_losses(
    logits: Tensor, restored: Tensor | None, clean: Tensor, labels: Tensor, unit: Tensor | float = 1.0,
    scale: float = 1.0, smoothing: float = 0.0,
) -> PassLosses:  # fmt: skip
    """Return the losses of one forward pass.

    Args:
        logits: N×K, as the head returns them; the published head squashes them.
        restored: N×C×H×W, an FPD's restored images; None for a baseline.
        clean: N×C×H×W in [0, 1], the target of the restoration: the images without noise.
        labels: N class indices.
        unit: unit of the restoration loss, see `restoration_unit`.
        scale: factor on the restored images; 255 in the published MNIST code.
        smoothing: label smoothing of the cross-entropy.
    """
    restoration = None if restored is None else F.mse_loss(scale * restored / unit, clean / unit)
    correct = (logits.argmax(dim=1) == labels).sum()
    return PassLosses(F.cross_entropy(logits, labels, label_smoothing=smoothing), restoration, correct, len(labels))


def phase_one_loss(losses: PassLosses, config: TrainingConfig) -> Tensor:
    """Return α₁·CE + α₂·L2, phase 1's loss with the gate open; for a baseline α₁·CE."""
    ce = config.alpha_ce * losses.ce
    return ce if losses.restoration is None else ce + config.alpha_restore * losses.restoration


def phase_two_loss(losses: PassLosses, config: TrainingConfig) -> Tensor:
    """Return α₁·CE + α₂'·L2, phase 2's loss."""
    assert losses.restoration is not None
    return config.alpha_ce * losses.ce + config.alpha_restore_second * losses.restoration


def noise_unit(model: nn.Module, config: TrainingConfig) -> Tensor | float:
    """Return the unit of the training noise: 1 pixel of [0, 1], or the model's std 1×C×1×1 (`space`)."""
    if config.space == "pixels":
        return 1.0
    assert isinstance(model.std, Tensor)
    return model.std


def restoration_unit(model: nn.Module, config: TrainingConfig) -> Tensor | float:
    """Return the unit of the restoration loss: the root mean square of the training noise, or the noise's own unit.

    Uniform noise of half-width ε has the root mean square ε/√3; in this unit, a restoration that returns x_noisy has a
    loss of 1.
    """
    unit = noise_unit(model, config)
    by_noise = config.restoration_unit == "noise" and config.noise > 0
    return unit * config.noise / math.sqrt(3) if by_noise else unit


# Steps


@dataclass(frozen=True)
class StepResult:
    """Losses of one step, detached.

    `first` is phase 1, in adversarial training on the clean images, or with the objective `madry`, which has no clean
    pass, on the adversarial images; `second` phase 2, None where it did not run; `adversarial` phase 1 of adversarial
    training, on the adversarial images. `gate_open` is None where the backbone is trained alone.
    """

    first: PassLosses
    second: PassLosses | None = None
    adversarial: PassLosses | None = None
    gate_open: bool | None = True


def two_phase_step(
    model: nn.Module, clean: Tensor, noisy: Tensor, labels: Tensor, update: Update, config: TrainingConfig,
    index: int = 0, generator: torch.Generator | None = None,
) -> StepResult:  # fmt: skip
    """Train an FPD on one batch in two phases, as above.

    Args:
        model: an FPD in training mode.
        clean: N×C×H×W in [0, 1], augmented or not.
        noisy: the same images with noise, not clipped.
        labels: N class indices.
        update: clears gradients, runs the backward pass and steps; usually an `OptimizerUpdate`.
        config: α₁, α₂, α₂', T (`threshold`), `gate_trains`, `second_pass`, `second_pass_interval`, `space` and the
            noise between the passes (`back_pass_noise`).
        index: position of the batch in its epoch; phase 2 runs where it is a multiple of `second_pass_interval`, so
            always with the default 0.
        generator: source of the noise between the passes, on the images' device.

    Raises:
        InputError: the model is not an FPD, or there is noise between the passes and no generator.
    """
    if not hasattr(model, "restore"):
        raise InputError(f"two_phase_step trains an FPD, found {type(model).__name__}; use baseline_step")
    if config.back_pass_noise > 0 and generator is None:
        raise InputError(
            f"the noise between the passes, ±{config.back_pass_noise:g}, is drawn from a generator, found None; "
            "pass generator=torch.Generator(), or set middle_noise=0"
        )
    unit, second = restoration_unit(model, config), None
    logits, restored = run_model(model, noisy, _middle_noise(model, noisy, config, generator))
    first = pass_losses(logits, restored, clean, labels, unit, smoothing=config.label_smoothing)
    assert restored is not None
    assert first.restoration is not None
    gate_open = gate_opens(first.restoration, clean, config, unit)
    if not gate_open:
        update(config.alpha_restore * first.restoration, only=GATED_GROUPS[config.gate_trains])
    elif index % config.second_pass_interval:
        update(phase_one_loss(first, config))
    else:
        second = both_phases(
            model, phase_one_loss(first, config), restored, clean, labels, update, config, generator,
            config.label_smoothing,
        )  # fmt: skip
    return StepResult(first.detach(), second, None, gate_open)


def backbone_step(
    model: nn.Module, clean: Tensor, noisy: Tensor, labels: Tensor, update: Update, config: TrainingConfig
) -> StepResult:
    """Train the backbone of an FPD alone on one batch: one step on α₁·CE, with x' = x_noisy.

    Arguments are those of `two_phase_step`. `rf.train` uses it for the first `restoration_start` of the
    epochs, at the cost of the baseline. The result has no gate.
    """
    logits, restored = model(noisy, restore=False)
    losses = pass_losses(
        logits, restored, clean, labels, restoration_unit(model, config), smoothing=config.label_smoothing
    )
    update(config.alpha_ce * losses.ce)
    return StepResult(losses.detach(), gate_open=None)


def both_phases(
    model: nn.Module, loss: Tensor, restored: Tensor, clean: Tensor, labels: Tensor, update: Update,
    config: TrainingConfig, generator: torch.Generator | None, smoothing: float,
) -> PassLosses:  # fmt: skip
    """Step on phase 1's `loss` and on phase 2's, which starts from phase 1's restored images.

    Noise is added between the passes where a generator is given. `smoothing` is that of the cross-entropy.

    `detached`: two steps; phase 2's gradient stops at the restored images. `joint`: one step on the sum of both losses.
    `through` (published code): two steps; phase 2's gradient continues into phase 1's graph.
    """
    unit, mode = restoration_unit(model, config), config.second_pass
    if mode != "joint":
        update(loss, retain_graph=mode == "through")
    images = restored.detach() if mode == "detached" else restored
    output = run_model(model, images, _middle_noise(model, images, config, generator))
    second = pass_losses(*output, clean, labels, unit, smoothing=smoothing)
    second_loss = phase_two_loss(second, config)
    update(loss + second_loss if mode == "joint" else second_loss)
    return second.detach()


def baseline_step(
    model: nn.Module, noisy: Tensor, labels: Tensor, update: Update, config: TrainingConfig
) -> StepResult:
    """Train a baseline on one batch of noisy images: one step on α₁·CE. Arguments are those of `two_phase_step`."""
    losses = pass_losses(model(noisy), None, noisy, labels, smoothing=config.label_smoothing)
    update(phase_one_loss(losses, config))
    return StepResult(losses.detach())


def run_model(model: nn.Module, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return logits and restored images, None for a baseline's; `noise` is added between an FPD's passes."""
    output: FPDOutput | Tensor = model(images) if noise is None else model(images, noise)
    return output if isinstance(output, FPDOutput) else (output, None)


def _middle_noise(
    model: nn.Module, images: Tensor, config: TrainingConfig, generator: torch.Generator | None
) -> Tensor | None:
    """Return uniform noise for the input of the back pass, like a batch N×C×H×W; None without noise or generator."""
    if generator is None or config.back_pass_noise == 0:
        return None
    noise = uniform_like(images, generator, ProcessGroup.current())
    return config.back_pass_noise * noise_unit(model, config) * noise


def gate_opens(restoration: Tensor, clean: Tensor, config: TrainingConfig, unit: Tensor | float = 1.0) -> bool:
    """Return whether the restoration loss, averaged over all ranks, is at most the threshold.

    With `threshold_unit: constant_image`, the threshold is relative to the restoration loss of the best constant image
    for the batch `clean`, N×C×H×W: the per-channel mean, whose loss is the variance averaged over the channels.
    """
    group = ProcessGroup.current()
    threshold = torch.as_tensor(config.threshold)
    if config.threshold_unit == "constant_image":
        variance = (clean / unit).var(dim=(0, 2, 3), correction=0).mean()
        threshold = config.threshold * group.all_reduce_mean(variance)
    return not bool(group.all_reduce_mean(restoration) > threshold)
