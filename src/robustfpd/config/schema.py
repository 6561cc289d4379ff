"""Every setting of a run, as frozen pydantic models: one docstring per field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from robustfpd.errors import InputError
from robustfpd.io import write_text

Norm = Literal["linf", "l2", "l1"]
Denoise = Literal["dot", "bottleneck", "softmax", "gaussian", "none"]
Middle = Literal["input", "restored", "none"]
Head = Literal["tanh", "spectral", "orthogonal", "linear"]
StageName = Literal["two-phase", "adversarial"]
Protocol = Literal["corrected", "published"]
Precision = Literal["auto", "fp32", "bf16"]

NORMS: tuple[str, ...] = get_args(Norm)
STAGES: tuple[str, ...] = get_args(StageName)
PRECISIONS: tuple[str, ...] = get_args(Precision)
DATASETS = ("caltech101", "caltech256", "cifar10", "digits", "fashion_mnist", "folder", "mnist", "svhn")
"""Names of the data sets, as `robustfpd.data` has them: known here so that asking for one takes no torch."""
SUITES = ("first-look", "full", "pgd-100", "published", "published-mnist", "quick", "standard")
"""Names of the suites of attacks, as `robustfpd.evaluation` has them."""
DEVICES = ("auto", "cpu", "cuda", "mps")
"""Kinds of devices; `cuda:1` is one of several."""
CUSTOM_BACKBONE = "custom"
"""`ModelConfig.backbone` of a module that the user passes as `net`."""


def check_eps(eps: Any, norm: str, name: str = "eps") -> float:
    """Return the radius `eps` of an Lp ball as a float.

    Raises:
        InputError: it is not a positive number, or above 1 in linf, where pixels lie in [0, 1].
    """
    if getattr(eps, "ndim", None) == 0:  # numbers of torch and numpy
        eps = eps.item()
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not math.isfinite(eps) or eps <= 0:
        raise InputError(f"{name} must be a positive number, found {eps!r}")
    if norm == "linf" and eps > 1:
        raise InputError(
            f"{name} must be at most 1 in linf (pixels lie in [0, 1]), found {eps}; 8/255 is eight grey levels"
        )
    return float(eps)


class Config(BaseModel):
    """Base of all settings: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


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
    """Images per step; several processes share each batch."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule and rate."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Course of the learning rate."""
    clip_grad_norm: float | None = Field(default=10.0, gt=0)
    """Largest L2 norm of the gradient; None does not clip."""
    activation_checkpointing: bool = False
    """Compute the blocks' activations again in the backward pass: a third slower, a fraction of the memory. With
    `second_pass: through` they are computed with the weights that have moved since, which the published code kept."""
    sync_batchnorm: bool = False
    """On several GPUs: batch norm over the batch of all ranks, as one process computes it, instead of over each rank's
    part."""
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
    second_pass: Literal["detached", "joint", "through"] = "detached"
    """`detached`: phase 2 is a step of its own whose gradient stops at the restored image; `joint`: both phases in one
    backward pass and one step; `through` (published code): a step of its own whose gradient continues into phase 1's
    graph, although the weights in it have been stepped."""
    second_pass_interval: int = Field(default=1, ge=1)
    """Phase 2 follows in the first of every so many batches of an epoch."""

    @property
    def steps_per_batch(self) -> float:
        """Optimiser steps that a batch takes while the gate is open, on average."""
        return 1.0 if self.second_pass == "joint" else 1 + 1 / self.second_pass_interval


class AdversarialConfig(ProcedureConfig):
    """Adversarial training, the second stage: the loss on clean and adversarial images, half each."""

    start: Literal["best", "scratch"] = "best"
    """Begin with the best two-phase checkpoint, or (published MNIST code) with new weights."""
    attack: Literal["pgd", "fgsm"] = "pgd"
    """What makes the adversarial images."""
    eps: float = 8 / 255
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
    def _check(self) -> AdversarialConfig:
        check_eps(self.eps, self.norm)
        if self.start_epoch >= self.epochs:
            raise ValueError(
                f"start_epoch {self.start_epoch} leaves none of {self.epochs} epochs for adversarial images; "
                "lower it or raise epochs"
            )
        return self


def _squared(values: Any, *names: str) -> Any:
    """Turn ints under `names` into squares."""
    if not isinstance(values, Mapping):
        return values
    return {**values, **{n: (values[n],) * 2 for n in names if isinstance(values.get(n), int)}}


class TaskConfig(Config):
    """What goes in and what comes out of a classifier."""

    num_classes: int = Field(ge=2)
    """Number of classes K; labels run from 0 to K-1."""
    in_channels: int = Field(default=3, ge=1)
    """Channels of an image: 1 for grey, 3 for RGB."""
    image_size: tuple[int, int]
    """Height and width in pixels; an int in YAML means a square."""

    @model_validator(mode="before")
    @classmethod
    def _square(cls, values: Any) -> Any:
        return _squared(values, "image_size")

    @model_validator(mode="after")
    def _positive(self) -> TaskConfig:
        if min(self.image_size) < 1:
            raise ValueError(f"image_size must be positive, found {self.image_size}")
        return self

    def __str__(self) -> str:
        """In words, for messages."""
        return f"{self.num_classes} classes of {self.in_channels}×{self.image_size[0]}×{self.image_size[1]} images"


class ModelConfig(Config):
    """A classifier: its backbone and the defence around it."""

    backbone: str = "resnet_mini"
    """A timm model name, `resnet_mini`, `package.module:factory` for a function that gives your own network, weights
    included (imported from where you work and what is installed, also when the model is loaded), `custom` for a module
    that is passed in Python, or the authors' networks: `published_resnet_3_4_23_3`, `published_resnext_3_4_6_3`,
    with the number of blocks in each stage."""
    stages: tuple[str, ...] | None = None
    """Names of the modules where stages end, stem first; None asks timm, or takes those of a ResNet."""
    defence: Literal["fpd", "none"] = "fpd"
    """`fpd` wraps the backbone in a Feature Pyramid Decoder; `none` is its undefended baseline."""
    pretrained: bool = False
    """Load timm's pretrained weights into the backbone."""
    small_stem: Literal[True, False, "auto"] = "auto"
    """Remove the downsampling before the pyramid's finest map; `auto`: when a side is under 64 pixels."""
    activation: Literal["elu", "keep"] = "elu"
    """`elu` replaces the backbone's activation modules; `keep` leaves them as they are."""
    denoise: Denoise = "dot"
    """Inner denoising layers; `middle` takes the same affinity (dot-product for `bottleneck` and `none`)."""
    denoise_after: tuple[int, ...] = (0, 1)
    """Indices of the stages after which a denoising layer is inserted.

    0 is the stem and 1 the published A₁ where timm lists a stem (ResNets: before the max pool); families with four
    stages, such as ConvNeXt, list none, and 0 is their A₁.
    """
    middle: Middle = "input"
    """Between the passes: add the denoised input (published code), the denoised restoration, or nothing."""
    pyramid_reads: Literal["denoised", "raw"] = "denoised"
    """Of a stage that a denoising layer follows, the pyramid reads the denoised map or (published code) the map before
    it; the next stage reads the denoised one either way."""
    pyramid_channels: int | None = Field(default=None, ge=1)
    """Width P of the pyramid; None takes a quarter of the last stage's channels, within 32 and 256."""
    unstrided_kernel: Literal[2, 3] = 3
    """Kernel of the decoder's transposed convolutions that keep the size; 2, the published ResNeXt's, takes two."""
    head: Head = "tanh"
    """Classification layer: `tanh` is the published one."""
    lipschitz: float = Field(default=1.0, gt=0)
    """L2 Lipschitz bound of the `spectral` and `orthogonal` heads."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability before the head, in training."""
    normalise: Literal["each_pass", "once"] = "each_pass"
    """Where mean and std apply: at the entrance of each pass, or (published CALTECH) once around everything, so that
    the restoration and the middle denoising work on normalised images."""
    mean: tuple[float, ...] | None = None
    """Per-channel mean subtracted inside the model; None: timm's when pretrained, else 0."""
    std: tuple[float, ...] | None = None
    """Per-channel standard deviation divided by inside the model; None: timm's when pretrained, else 1."""

    def baseline(self) -> ModelConfig:
        """The same network without the defence: no inserted, its own activations, plain logits."""
        return self.model_copy(update={"defence": "none", "activation": "keep"})


class AugmentConfig(Config):
    """Random changes to training images, drawn per image."""

    rotation: float = Field(default=0.0, ge=0)
    """Largest rotation in degrees, either way."""
    translation: float = Field(default=0.0, ge=0, le=1)
    """Largest shift as a fraction of each side."""
    flip: bool = False
    """Mirror half of the images left to right."""
    crop: float = Field(default=1.0, gt=0, le=1)
    """Smallest area of a random crop, as a share of the picture; 1 does not crop. Aspect ratios go from 3/4 to 4/3."""
    expand: bool = False
    """Shrink a rotated picture until all of it is in view, instead of losing its corners."""
    brightness: float = Field(default=0.0, ge=0, le=1)
    """Pixels are multiplied by a factor within 1 plus or minus this."""
    contrast: float = Field(default=0.0, ge=0, le=1)
    """Differences to the picture's mean are multiplied by a factor within 1 plus or minus this."""


class DataConfig(Config):
    """Which images, and how they are split."""

    dataset: str = "digits"
    """Name of a data set; `robustfpd datasets` lists them. `folder` is any folder of class folders."""
    root: str = "data"
    """Folder where torchvision keeps its data sets, or the `folder` data set itself; not used by `digits`."""
    download: bool = False
    """Fetch the data set into `root` when it is not there."""
    cache: str | None = None
    """Folder for decoded and resized images; None: ROBUSTFPD_CACHE, else the user's cache folder."""
    image_size: tuple[int, int] | None = None
    """Height and width that the network sees; an int in YAML means a square, None the data set's own."""
    stored_size: tuple[int, int] | None = None
    """Height and width of the cached images; larger than `image_size` leaves room for crops. None: `image_size`."""
    channels: Literal[1, 3, None] = None
    """Channels that the network sees; 3 repeats grey images. None: the data set's own."""
    background: bool = False
    """CALTECH: keep the folder of background pictures as a class of its own (as published)."""
    split: Literal["stratified", "published"] = "stratified"
    """Data sets without a test set: draw it from each class by `split_seed`, or take the last files of each class."""
    test_fraction: float = Field(default=0.1, gt=0, lt=0.9)
    """Data sets without a test set: share of each class that becomes it."""
    selection: Literal["held_out", "test"] = "held_out"
    """Images that pick the best epoch: held out of training, or (as published) the test images themselves."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.9)
    """Share of the training images of each class held out for early stopping."""
    split_seed: int = 0
    """Seed of the split; kept apart from the run's seed so that runs share their test images."""
    train_limit: int | None = Field(default=None, ge=2)
    """Train on this many images only."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What a file that cannot be decoded does: end the run with its name, or be left out and counted."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of training images."""

    @model_validator(mode="before")
    @classmethod
    def _squares(cls, values: Any) -> Any:
        return _squared(values, "image_size", "stored_size")

    @model_validator(mode="after")
    def _sizes(self) -> DataConfig:
        for name in ("image_size", "stored_size"):
            size = getattr(self, name)
            if size is not None and min(size) < 1:
                raise ValueError(f"{name} must be positive, found {size}")
        return self


class EvaluationConfig(Config):
    """Defaults of `robustfpd evaluate`."""

    suite: str = "quick"
    """Which attacks; `robustfpd.evaluation.suite_names()` lists the suites."""
    norm: Norm = "linf"
    """Norm of the perturbation."""
    eps: tuple[float, ...] = (8 / 255,)
    """Radii of the perturbation, in pixels of [0, 1]."""
    num_images: int = Field(default=1000, ge=1)
    """How many test images, taken from the front after a seeded shuffle."""
    space: Literal["pixels", "normalised"] = "pixels"
    """Where eps is measured and images are clipped to [0, 1]: pixels, or (published CALTECH) after normalisation."""
    divide_by: int | None = Field(default=None, ge=1)
    """Count that the published evaluation divides by, however many images it attacked; shown beside the accuracy."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if not self.eps:
            raise ValueError("eps must hold at least one radius")
        for eps in self.eps:
            check_eps(eps, self.norm)
        return self


class RunConfig(Config):
    """One run: data, model, training, evaluation and the seed of every random draw."""

    recipe: str = "custom"
    """Name of the recipe this came from."""
    protocol: Protocol = "corrected"
    """`published` repeats what the authors' code does; docs/protocols.md lists the differences."""
    stage: StageName = "two-phase"
    """Which stage of training this run is."""
    seed: int = 0
    """Seed of weights, order, noise, augmentation and attacks."""
    data: DataConfig = DataConfig()
    """Images."""
    model: ModelConfig = ModelConfig()
    """Classifier."""
    training: TrainingConfig = TrainingConfig()
    """Procedure of the first stage; the second takes its weights of losses, gate and second pass."""
    adversarial: AdversarialConfig = AdversarialConfig()
    """Procedure of the second stage."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Attacks."""

    @property
    def procedure(self) -> ProcedureConfig:
        """Epochs, optimiser and the like of this run's stage."""
        return self.adversarial if self.stage == "adversarial" else self.training

    def baseline(self) -> RunConfig:
        """The undefended baseline's run: same data, noise and number of optimiser steps, no defence.

        Where the FPD's second pass is an optimiser step of its own, the baseline runs more epochs, twice as many if it
        follows every batch, and has as much more patience. Where the gate was shut, and in clean epochs before the
        first attack, the FPD took one step, so the baseline has a few more.
        """
        longer = self.training.steps_per_batch
        return self.model_copy(
            update={
                "model": self.model.baseline(),
                "training": _longer(self.training, longer),
                "adversarial": _longer(self.adversarial, longer if self.adversarial.second_pass else 1),
            }
        )

    def save(self, path: Path) -> None:
        """Write the settings as YAML."""
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


P = TypeVar("P", bound=ProcedureConfig)


def _longer(old: P, factor: float) -> P:
    """The same procedure over `factor` times the epochs."""
    patience = None if old.early_stop_patience is None else round(old.early_stop_patience * factor)
    schedule = old.schedule.model_copy(update={"patience": round(old.schedule.patience * factor)})
    return old.model_copy(
        update={"epochs": round(old.epochs * factor), "early_stop_patience": patience, "schedule": schedule}
    )
