"""Settings of two-phase and adversarial training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from robustfpd.config.base import Config, Norm, check_eps

Objective = Literal["mixed", "madry", "trades", "mart"]
# YAML reads `true` as a boolean.
Labels = Annotated[Literal["predicted", "true"], BeforeValidator(lambda value: "true" if value is True else value)]


class OptimizerConfig(Config):
    """The optimizer, under torch's names and defaults."""

    name: Literal["adam", "adamax", "adamw", "sgd"] = "adam"
    """Update rule."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate; the peak for `one_cycle`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """L2 penalty on all parameters (decoupled for adamw)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of sgd; the others take torch's betas (with `one_cycle`, the first beta moves from 0.95 to 0.85)."""


class ScheduleConfig(Config):
    """The learning-rate schedule."""

    name: Literal["constant", "plateau", "cosine", "one_cycle"] = "plateau"
    """`plateau` follows validation accuracy by epoch; `cosine` and `one_cycle` follow the step.

    `one_cycle` also lowers the momentum by 0.1 while the rate is high.
    """
    patience: int = Field(default=10, ge=0)
    """plateau: epochs without a better validation accuracy before the rate is reduced."""
    factor: float = Field(default=0.1, gt=0, lt=1)
    """plateau: factor that reduces the rate."""
    follows: Literal["accuracy", "loss"] = "accuracy"
    """plateau: validation accuracy, or (as published) validation cross-entropy plus restoration loss."""


class ProcedureConfig(Config):
    """Settings of every stage of training."""

    epochs: int = Field(default=100, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=128, ge=2)
    """Images per step, over all ranks."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning-rate schedule."""
    clip_grad_norm: float | None = Field(default=10.0, gt=0)
    """Largest L2 norm of the gradient; None does not clip."""
    activation_checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass: a third slower, a fraction of the memory. With
    `second_pass: through` they are recomputed with the updated weights, unlike in the published code."""
    sync_batchnorm: bool = False
    """On several GPUs: batch norm over the batch of all ranks, as in a single process, not over that of each rank."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Weight of the uniform distribution in the targets of the cross-entropy (Szegedy et al., CVPR 2016, section 7)."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of an exponential moving average (EMA) of the weights, updated after each step; lower in the first steps.
    Validation and the best checkpoint use the average. 0 disables it."""
    early_stop_patience: int | None = Field(default=20, ge=1)
    """Epochs without a better validation accuracy (or an equal one with a lower loss) before training stops; None
    never stops early."""

    def longer(self, factor: float) -> Self:
        """Return the settings with `factor` times the epochs and the patience."""
        patience = None if self.early_stop_patience is None else round(self.early_stop_patience * factor)
        schedule = self.schedule.model_copy(update={"patience": round(self.schedule.patience * factor)})
        update = {"epochs": round(self.epochs * factor), "early_stop_patience": patience, "schedule": schedule}
        return self.model_copy(update=update)


class TrainingConfig(ProcedureConfig):
    """Two-phase training."""

    space: Literal["pixels", "normalised"] = "pixels"
    """Units of `noise` and of the restoration loss: pixels of [0, 1], or (published CALTECH) after mean and std."""
    noise: float = Field(default=0.01, ge=0)
    """Half-width of the uniform noise added to training images, in units of `space`."""
    middle_noise: float | None = Field(default=None, ge=0)
    """Half-width of the uniform noise added to the input of the back pass in training, in units of `space`; None: as
    much as `noise`."""
    threshold: float = Field(default=0.5, ge=0)
    """T: while the restoration loss is above it, the gate is shut and only the modules of `gate_trains` learn."""
    threshold_unit: Literal["constant_image", "absolute"] = "constant_image"
    """Unit of `threshold`: the restoration loss of the best constant image of the batch, or (published) 1."""
    restoration_unit: Literal["noise", "space"] = "noise"
    """Unit of the restoration loss: the root mean square of `noise`, so that images that keep the noise have a loss of
    1, or (published) that of `space`."""
    gate_trains: Literal["front_and_restoration", "upscaling"] = "front_and_restoration"
    """Modules that learn while the gate is shut: FPD_FD and FPD_R as in the paper, or (published code) only the
    transposed convolutions."""
    alpha_ce: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy in both phases."""
    alpha_restore: float = Field(default=0.6, ge=0)
    """Weight of the restoration loss in phase 1."""
    alpha_restore_second: float = Field(default=0.6, ge=0)
    """Weight of the restoration loss in phase 2."""
    restoration_start: float = Field(default=0.2, ge=0, lt=1)
    """Fraction of the epochs, at the start, in which only the backbone is trained, on noisy images and at the cost of
    the baseline. Two-phase training follows."""
    second_pass: Literal["detached", "joint", "through"] = "detached"
    """`detached`: phase 2 is a separate step whose gradient stops at the restored image; `joint`: both phases in one
    backward pass and one step; `through` (published code): a separate step whose gradient continues into phase 1's
    graph, although its weights have been updated."""
    second_pass_interval: int = Field(default=8, ge=1)
    """Run phase 2 in one of this many batches, starting with the first batch of each epoch."""

    @property
    def back_pass_noise(self) -> float:
        """Half-width of the noise between the passes: `middle_noise`, or `noise` where that is None."""
        return self.noise if self.middle_noise is None else self.middle_noise

    @property
    def batch_shares(self) -> tuple[float, float, float]:
        """Fractions of batches, with an open gate: the backbone alone, phase 1 alone, both phases."""
        alone, both = self.restoration_start, 1 / self.second_pass_interval
        return alone, (1 - alone) * (1 - both), (1 - alone) * both


class AdversarialConfig(ProcedureConfig):
    """Adversarial training, the second stage, or the only one with `start: scratch`."""

    start: Literal["best", "scratch"] = "best"
    """Initial weights: the best two-phase checkpoint, or (published MNIST code) new ones."""
    objective: Objective = "mixed"
    """Loss of the logits: `mixed`, half of the cross-entropy on clean and half on adversarial images (published);
    `madry`, the cross-entropy of the adversarial images; `trades` or `mart`. An FPD adds its restoration loss."""
    beta: float = Field(default=6.0, gt=0)
    """trades, mart: weight of the Kullback-Leibler term, β in TRADES and λ in MART."""
    awp: float = Field(default=0.0, ge=0)
    """Radius γ of the adversarial weight perturbation (AWP) relative to the norm of each weight (Wu et al., NeurIPS
    2020); 0 does not perturb weights."""
    attack: Literal["pgd", "fgsm", "fgsm-rs"] = "pgd"
    """Attack that generates the adversarial images; `fgsm-rs` is one step from a random point of the ball (Wong et
    al., ICLR 2020)."""
    eps: float = 8 / 255
    """Radius of the perturbation, in pixels of [0, 1]."""
    norm: Norm = "linf"
    """Norm of the perturbation."""
    steps: int = Field(default=10, ge=1)
    """pgd: gradient steps."""
    step_size: float | None = Field(default=None, gt=0)
    """Length of each step in `norm`; None: the schedule of `pgd`, from eps down to 0; fgsm: eps; fgsm-rs: 1.25 eps."""
    view: Literal["pre-squash", "logits"] = "pre-squash"
    """The attack differentiates the logits before the squashing, which masks gradients, or (published) after it."""
    start_epoch: int = Field(default=0, ge=0)
    """Epochs on clean images before the first adversarial ones."""
    warmup: float = Field(default=0.0, ge=0)
    """Epochs over which eps grows from 0, counted from `start_epoch`."""
    labels: Labels = "predicted"
    """Labels for the attack's loss: the model's own predictions, which avoid label leaking, or the true classes, the
    default of `madry` and `mart`. `trades` ignores this field: its attack maximizes the divergence from the clean
    image's probabilities."""
    batch: Literal["joint", "both", "halves"] = "joint"
    """`joint`: one forward pass over the clean and adversarial images of a batch; `both` (published): two passes, whose
    batch statistics differ between clean and adversarial images; `halves` (objective `mixed` only): half of each batch
    is clean, the other half adversarial. `madry` has no clean images."""
    restoration_target: Literal["clean", "input"] = "clean"
    """Target of the restoration of an adversarial image: the clean image, or (published SVHN) the image itself."""
    restored_scale: float = Field(default=1.0, gt=0)
    """Factor on the restored clean image in the restoration loss; 255 in the published MNIST code."""
    alpha_features: float = Field(default=0.0, ge=0)
    """FPD: weight of the mean squared distance between the features in front of the head of adversarial and of clean
    images, relative to the mean square of the latter, which take no gradient. `madry` and `mixed` with `halves` have no
    clean pass of the same images."""
    gate: bool = True
    """Whether the gate of two-phase training applies, to the restoration loss of the clean images."""
    second_pass: bool = True
    """Whether phase 2 follows, as in `training.second_pass`, on the restored adversarial images, with `batch: halves`
    on the restored images of both halves. Not in clean epochs."""
    select_by: Literal["robust", "clean"] = "robust"
    """Validation accuracy that selects the best epoch: under PGD-10 at `eps`, or (published) on clean images."""
    select_images: int = Field(default=500, ge=1)
    """robust: number of validation images attacked after each epoch."""

    @model_validator(mode="before")
    @classmethod
    def _default_labels(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("objective") in ("madry", "mart"):
            return {"labels": "true", **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> AdversarialConfig:
        check_eps(self.eps, self.norm)
        if self.objective != "mixed" and self.batch == "halves":
            raise ValueError(
                f"batch halves requires objective mixed, found objective {self.objective}; "
                "set adversarial.batch=joint or adversarial.objective=mixed"
            )
        if self.alpha_features and (self.objective == "madry" or self.batch == "halves"):
            raise ValueError(
                f"alpha_features requires a clean pass of the same images, found objective {self.objective} with batch "
                f"{self.batch}; set adversarial.alpha_features=0, or objective trades, mart or mixed with batch joint"
            )
        if self.objective == "trades" and self.attack == "fgsm":
            raise ValueError(
                "attack fgsm starts at the image, where the divergence of objective trades has no gradient; "
                "set adversarial.attack=fgsm-rs or pgd"
            )
        if self.attack == "fgsm-rs" and self.select_by == "clean":
            raise ValueError(
                "attack fgsm-rs can overfit catastrophically, which only the robust validation accuracy detects; found "
                "select_by clean, set adversarial.select_by=robust"
            )
        if self.objective != "mixed" and self.restored_scale != 1:
            raise ValueError(
                f"restored_scale applies to objective mixed only, found objective {self.objective}; leave out "
                "adversarial.restored_scale"
            )
        if self.start_epoch + self.warmup > self.epochs:
            raise ValueError(
                f"eps reaches its value after start_epoch + warmup = {self.start_epoch + self.warmup:g} epochs, found "
                f"epochs {self.epochs}; lower adversarial.warmup or raise adversarial.epochs"
            )
        if self.start_epoch >= self.epochs:
            raise ValueError(
                f"start_epoch {self.start_epoch} must be below epochs, found {self.epochs}; lower it or raise epochs"
            )
        return self
