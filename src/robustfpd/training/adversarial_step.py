"""The step of adversarial training: the losses on clean and adversarial images, and the update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.config import AdversarialConfig, TrainingConfig
from robustfpd.training.objectives import OBJECTIVES
from robustfpd.training.optim import GATED_GROUPS, Update
from robustfpd.training.steps import (
    PassLosses,
    StepResult,
    both_phases,
    gate_opens,
    pass_losses,
    phase_one_loss,
    restoration_unit,
    run_model,
)
from robustfpd.training.weight_perturbation import perturbed, weight_perturbations

EPSILON = 1e-12
"""Added to denominators."""


def adversarial_step(
    model: nn.Module, clean: Tensor, adversarial: Tensor | None, labels: Tensor, update: Update,
    config: TrainingConfig, settings: AdversarialConfig, index: int = 0,
) -> StepResult:  # fmt: skip
    """Train an FPD or a baseline on adversarial images by `settings.objective`.

    The loss is α₁·objective + α₂·L2, with the mean of the restoration losses of all passes; an FPD then runs phase 2 on
    the restored adversarial images. The gate reads the restoration loss of the first pass, on clean images unless the
    objective is `madry`. No noise is added, neither to the images nor between the passes. With `awp` both phases run
    with the weights that increase the loss of phase 1.

    Args:
        model: an FPD or a baseline in training mode.
        clean: N×C×H×W in [0, 1].
        adversarial: adversarial images of all N images, or with `batch: halves` of the second half of the batch, as
            `adversarial_images` returns them. None trains on clean images alone, without phase 2.
        labels: N class indices.
        update: as in `two_phase_step`.
        config: as in `two_phase_step`: weights of the losses, gate and phase 2 are those of the first stage.
        settings: `objective`, `beta`, `awp`, `label_smoothing`, `batch`, `restoration_target`, `restored_scale`,
            `alpha_features`, `gate` and `second_pass`.
        index: as in `two_phase_step`.
    """

    def losses() -> _AdversarialLosses:
        return _adversarial_losses(model, clean, adversarial, labels, config, settings)

    perturbations = []
    if settings.awp and adversarial is not None:
        backward = getattr(update, "backward", Tensor.backward)
        perturbations = weight_perturbations(model, lambda: losses().loss, settings.awp, backward)
    with perturbed(perturbations):
        loss, passes, restored = losses()
        first, second, gate_open = passes[0], None, True
        if first.restoration is not None and settings.gate:
            gate_open = gate_opens(first.restoration, clean, config, restoration_unit(model, config))
        if first.restoration is not None and not gate_open:
            update(config.alpha_restore * first.restoration, only=GATED_GROUPS[config.gate_trains])
        elif restored is None or not settings.second_pass or index % config.second_pass_interval:
            update(loss)
        else:
            second = both_phases(model, loss, restored, clean, labels, update, config, None, settings.label_smoothing)
    return StepResult(first.detach(), second, None if adversarial is None else passes[-1].detach(), gate_open)


class _AdversarialLosses(NamedTuple):
    """The loss of a batch, the losses of its passes (clean, then adversarial), and phase 2's restored images."""

    loss: Tensor
    passes: list[PassLosses]
    restored: Tensor | None


def _adversarial_losses(
    model: nn.Module, clean: Tensor, adversarial: Tensor | None, labels: Tensor, config: TrainingConfig,
    settings: AdversarialConfig,
) -> _AdversarialLosses:  # fmt: skip
    """Run the model on clean and adversarial images and return the losses."""
    target = adversarial if settings.restoration_target == "input" and adversarial is not None else clean
    unit, smoothing, scale = restoration_unit(model, config), settings.label_smoothing, settings.restored_scale
    if adversarial is None:
        losses = pass_losses(*run_model(model, clean), clean, labels, unit, scale, smoothing)
        return _AdversarialLosses(phase_one_loss(losses, config), [losses], None)
    if settings.batch == "halves":
        passes, restored = _halves(model, clean, adversarial, labels, config, settings)
        loss = torch.stack([phase_one_loss(losses, config) for losses in passes]).mean()
        return _AdversarialLosses(loss, passes, restored)
    wanted = settings.alpha_features > 0
    collected: AbstractContextManager[list[Tensor]] = _head_inputs(model) if wanted else nullcontext([])
    with collected as features:
        if settings.objective == "madry":
            outputs = [run_model(model, adversarial)]
        elif settings.batch == "both":
            outputs = [run_model(model, clean), run_model(model, adversarial)]
        else:
            logits, restored = run_model(model, torch.cat([clean, adversarial]))
            parts = (None, None) if restored is None else restored.chunk(2)
            outputs = list(zip(logits.chunk(2), parts, strict=True))
    logits, restored = outputs[-1]
    passes = [pass_losses(logits, restored, target, labels, unit, smoothing=smoothing)]
    if len(outputs) > 1:
        passes.insert(0, pass_losses(*outputs[0], clean, labels, unit, scale, smoothing))
    if settings.objective == "mixed":
        ce = torch.stack([losses.ce for losses in passes]).mean()
    else:
        ce = OBJECTIVES[settings.objective](outputs[0][0], logits, labels, settings.beta, smoothing)
    restorations = [losses.restoration for losses in passes if losses.restoration is not None]
    loss = config.alpha_ce * ce
    if restorations:
        loss = loss + config.alpha_restore * torch.stack(restorations).mean()
    if restored is not None and settings.alpha_features:
        of_clean, of_adversarial = torch.cat(features).chunk(2)
        loss = loss + settings.alpha_features * _relative_distance(of_adversarial, of_clean.detach())
    return _AdversarialLosses(loss, passes, restored)


@contextmanager
def _head_inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the features N×C in front of the head, of each forward pass."""
    features: list[Tensor] = []
    assert isinstance(model.head, nn.Module)
    hook = model.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    try:
        yield features
    finally:
        hook.remove()


def _relative_distance(features: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared distance of features N×C from their target, relative to the target's mean square."""
    target = target.float()
    return F.mse_loss(features.float(), target) / (target.square().mean() + EPSILON)


def _halves(
    model: nn.Module, clean: Tensor, adversarial: Tensor, labels: Tensor, config: TrainingConfig,
    settings: AdversarialConfig,
) -> tuple[list[PassLosses], Tensor | None]:  # fmt: skip
    """Run one pass on the first half of the images, clean, and the adversarial ones of the second half."""
    half = len(clean) - len(adversarial)
    images = torch.cat([clean[:half], adversarial])
    logits, restored = run_model(model, images)
    target = images if settings.restoration_target == "input" else clean

    def part(images: slice, scale: float) -> PassLosses:
        own, unit = None if restored is None else restored[images], restoration_unit(model, config)
        smoothing = settings.label_smoothing
        return pass_losses(logits[images], own, target[images], labels[images], unit, scale, smoothing)

    return [part(slice(half), settings.restored_scale), part(slice(half, None), 1.0)], restored
