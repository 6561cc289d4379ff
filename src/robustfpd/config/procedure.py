"""How networks are trained: optimiser, schedule, and the procedure of each stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from robustfpd.config.base import Config, Norm


class OptimizerConfig(Config):
    """The optimiser, under torch's names and defaults."""

    name: Literal["adam", "adamax", "adamw", "sgd"] = "adam"
    """Update rule."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate; the peak for `one_cycle`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """L2 penalty on all parameters (decoupled for adamw)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of sgd; the others take torch's betas (with `one_cycle`, the first beta moves from 0.95 to 0.85)."""


class ScheduleConfig(Config):
    """How the learning rate moves."""

    name: Literal["constant", "plateau", "cosine", "one_cycle"] = "plateau"
    """`plateau` follows validation accuracy by epoch; `cosine` and `one_cycle` follow the step.

    `one_cycle` also lowers the momentum by 0.1 while the rate is high.
    """
    patience: int = Field(default=10, ge=0)
    """plateau: epochs without a better validation accuracy before the rate falls."""
    factor: float = Field(default=0.1, gt=0, lt=1)
    """plateau: what the rate is multiplied by."""
    follows: Literal["accuracy", "loss"] = "accuracy"
    """plateau: validation accuracy, or (as published) validation cross-entropy plus restoration loss."""


class ProcedureConfig(Config):
    """What every stage of training has."""

    epochs: int = Field(default=100, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=128, ge=2)
    """Images a step, of all processes together: several processes share each batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule and rate."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Course of the learning rate."""
    clip: float | None = Field(default=10.0, gt=0)
    """Largest L2 norm of the gradient; None does not clip."""
    recompute: bool = False
    """Compute the blocks' activations again in the backward pass: a third slower, a fraction of the memory. With
    `second_pass: through` they are computed with the weights that have moved since, which the published code kept."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes: `ddp` (which `auto` takes) keeps everything in each of them, `fsdp` shares out weights,
    gradients and the optimiser's state, which is slower and saves memory. The training is the same."""
    sync_batchnorm: bool = False
    """With several processes: whether batch norm takes mean and variance of the whole batch, as one process does, or of
    each process's own part."""
    early_stop_patience: int | None = Field(default=20, ge=1)
    """Epochs without a better validation accuracy (or an equal one with a lower loss) before training stops.

    None never stops early.
    """


class TrainingConfig(ProcedureConfig):
    """Two-phase training (published defaults)."""

    space: Literal["pixels", "normalised"] = "pixels"
    """Units of `noise` and of the restoration loss: pixels of [0, 1], or (published CALTECH) after mean and std."""
    noise: float = Field(default=0.01, ge=0)
    """Half-width of the uniform noise added to training images, in units of `space`."""
    threshold: float = Field(default=3.0, ge=0)
    """T: while the restoration loss is above it, only what `gate_trains` names learns."""
    gate_trains: Literal["front_and_restoration", "upscaling"] = "front_and_restoration"
    """What learns behind the shut gate: FPD_FD and FPD_R as the paper says, or (published code) the transposed
    convolutions alone."""
    alpha_ce: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy in both phases."""
    alpha_restore: float = Field(default=1.0, ge=0)
    """Weight of the restoration loss in phase 1."""
    alpha_restore_second: float = Field(default=1.0, ge=0)
    """Weight of the restoration loss in phase 2."""
    second_pass: Literal["detached", "joint", "shared", "through"] = "detached"
    """`detached`: phase 2 is a step of its own whose gradient stops at the restored image; `joint`: both phases in one
    backward and one step; `shared`: as `joint`, with phase 1's back pass taken for phase 2's front pass, so that three
    passes through the backbone do for four (adversarial training takes `joint`); `through` (published code): a step of
    its own whose gradient goes on into phase 1's graph, whose weights have moved since."""
    second_every: int = Field(default=1, ge=1)
    """Phase 2 follows in the first of every so many batches of an epoch."""

    @property
    def steps_per_batch(self) -> float:
        """Optimiser steps that a batch takes while the gate is open, on average."""
        return 1.0 if self.second_pass in ("joint", "shared") else 1 + 1 / self.second_every


class AdversarialConfig(ProcedureConfig):
    """Adversarial training, the second stage: the loss on clean and adversarial images, half each."""

    start: Literal["best", "scratch"] = "best"
    """Begin with the best two-phase checkpoint, or (published MNIST code) with new weights."""
    attack: Literal["pgd", "fgsm"] = "pgd"
    """What makes the adversarial images."""
    eps: float = Field(default=8 / 255, gt=0)
    """Radius of the perturbation, in pixels of [0, 1]."""
    norm: Norm = "linf"
    """Norm of the perturbation."""
    steps: int = Field(default=10, ge=1)
    """pgd: gradient steps."""
    step_size: float | None = Field(default=None, gt=0)
    """pgd: length of each step in `norm`; None takes the attack's own course, from eps down to 0."""
    view: Literal["pre-squash", "logits"] = "pre-squash"
    """What the attack differentiates: logits before the squashing, which hides gradients, or (published) after it."""
    start_epoch: int = Field(default=0, ge=0)
    """Epochs on clean images before the first adversarial ones."""
    warmup: float = Field(default=0.0, ge=0)
    """Epochs over which eps grows from 0, counted from `start_epoch`."""
    labels: Literal["predicted", "true"] = "predicted"
    """What the attack leads away from: the model's own predictions, which leak no label, or the true classes."""
    batch: Literal["both", "halves"] = "both"
    """Every image clean and adversarial (published), or one half of a batch clean and the other adversarial."""
    restoration_target: Literal["clean", "input"] = "clean"
    """What the restoration of an adversarial image is compared with: the clean image, or (published SVHN) itself."""
    restored_scale: float = Field(default=1.0, gt=0)
    """Factor on the restored clean image before it is compared; 255 in the published MNIST code."""
    gate: bool = True
    """Whether the gate of two-phase training is at work here too, on the clean images' restoration."""
    second_pass: bool = True
    """Whether what was restored goes through once more, as `training.second_pass` says: the adversarial images'
    restoration, with `batch: halves` that of both halves. Not in clean epochs."""
    select_by: Literal["robust", "clean"] = "robust"
    """What the best epoch is best in: validation images under PGD-10 at `eps`, or (published) clean ones."""
    select_images: int = Field(default=500, ge=1)
    """robust: how many validation images are attacked after each epoch."""

    @model_validator(mode="after")
    def _radius(self) -> AdversarialConfig:
        if self.norm == "linf" and self.eps > 1:
            raise ValueError(f"eps must be at most 1 in linf (8/255 is 0.0314), found {self.eps}")
        if self.start_epoch >= self.epochs:
            raise ValueError(
                f"start_epoch {self.start_epoch} leaves none of {self.epochs} epochs for adversarial images; "
                "lower it or raise epochs"
            )
        return self
