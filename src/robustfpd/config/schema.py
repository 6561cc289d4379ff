"""Every setting of a run, as frozen pydantic models: one docstring per field."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from robustfpd.errors import InputError
from robustfpd.io import write_text

Norm = Literal["linf", "l2", "l1"]
Denoise = Literal["normalised", "dot", "bottleneck", "softmax", "gaussian", "none"]
Middle = Literal["input", "restored", "none"]
Head = Literal["tanh", "spectral", "orthogonal", "linear"]
StageName = Literal["two-phase", "adversarial"]
Protocol = Literal["improved", "corrected", "published"]
Precision = Literal["auto", "fp32", "bf16"]

NORMS: tuple[str, ...] = get_args(Norm)
STAGES: tuple[str, ...] = get_args(StageName)
PRECISIONS: tuple[str, ...] = get_args(Precision)
DATASETS = ("caltech101", "caltech256", "cifar10", "digits", "fashion_mnist", "folder", "mnist", "svhn")
"""Names of the data sets in `robustfpd.data`, listed here so that the command line needs no torch."""
SUITES = ("first-look", "full", "pgd-100", "published", "published-mnist", "quick", "standard")
"""Names of the suites in `robustfpd.evaluation`."""
DEVICES = ("auto", "cpu", "cuda", "mps")
"""Device types; an index follows a colon, as in `cuda:1`."""
CUSTOM_BACKBONE = "custom"
"""`ModelConfig.backbone` of a module that the user passes as `net`."""


def check_eps(eps: Any, norm: str, name: str = "eps") -> float:
    """Return the radius `eps` of an Lp ball as a float.

    Raises:
        InputError: it is not a positive number, or above 1 in linf, where pixels lie in [0, 1].
    """
    if getattr(eps, "ndim", None) == 0:  # scalars of torch and numpy
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
    noise_level: Literal["fixed", "per_image"] = "fixed"
    """fixed: all images get noise of half-width `noise`; per_image: each image draws its half-width from
    U(0, √3·`noise`), with the same mean square. Almost clean images among the noisy ones keep clean accuracy where
    images have texture."""
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
    """Adversarial training, the second stage: the loss on clean and adversarial images, half each."""

    start: Literal["best", "scratch"] = "best"
    """Initial weights: the best two-phase checkpoint, or (published MNIST code) new ones."""
    attack: Literal["pgd", "fgsm"] = "pgd"
    """Attack that generates the adversarial images."""
    eps: float = 8 / 255
    """Radius of the perturbation, in pixels of [0, 1]."""
    norm: Norm = "linf"
    """Norm of the perturbation."""
    steps: int = Field(default=10, ge=1)
    """pgd: gradient steps."""
    step_size: float | None = Field(default=None, gt=0)
    """pgd: length of each step in `norm`; None takes the attack's own schedule, from eps down to 0."""
    view: Literal["pre-squash", "logits"] = "pre-squash"
    """The attack differentiates the logits before the squashing, which masks gradients, or (published) after it."""
    start_epoch: int = Field(default=0, ge=0)
    """Epochs on clean images before the first adversarial ones."""
    warmup: float = Field(default=0.0, ge=0)
    """Epochs over which eps grows from 0, counted from `start_epoch`."""
    labels: Literal["predicted", "true"] = "predicted"
    """Labels that the attack leads away from: the model's own predictions, which leak no label, or the true classes."""
    batch: Literal["both", "halves"] = "both"
    """Every image clean and adversarial (published), or half of each batch clean and the other half adversarial."""
    restoration_target: Literal["clean", "input"] = "clean"
    """Target of the restoration of an adversarial image: the clean image, or (published SVHN) the image itself."""
    restored_scale: float = Field(default=1.0, gt=0)
    """Factor on the restored clean image in the restoration loss; 255 in the published MNIST code."""
    gate: bool = True
    """Whether the gate of two-phase training applies, to the restoration loss of the clean images."""
    second_pass: bool = True
    """Whether phase 2 follows, as in `training.second_pass`, on the restored adversarial images, with `batch: halves`
    on the restored images of both halves. Not in clean epochs."""
    select_by: Literal["robust", "clean"] = "robust"
    """Validation accuracy that selects the best epoch: under PGD-10 at `eps`, or (published) on clean images."""
    select_images: int = Field(default=500, ge=1)
    """robust: number of validation images attacked after each epoch."""

    @model_validator(mode="after")
    def _check(self) -> AdversarialConfig:
        check_eps(self.eps, self.norm)
        if self.start_epoch >= self.epochs:
            raise ValueError(
                f"start_epoch {self.start_epoch} must be below epochs, found {self.epochs}; lower it or raise epochs"
            )
        return self


Size = Annotated[
    tuple[PositiveInt, PositiveInt], BeforeValidator(lambda size: (size, size) if isinstance(size, int) else size)
]
"""Height and width in pixels; an int means a square."""


class TaskConfig(Config):
    """Input and output of a classifier."""

    num_classes: int = Field(ge=2)
    """Number of classes K; labels run from 0 to K-1."""
    in_channels: int = Field(default=3, ge=1)
    """Channels of an image: 1 for grey, 3 for RGB."""
    image_size: Size
    """Height and width in pixels; an int in YAML means a square."""

    def __str__(self) -> str:
        """Return a description for messages."""
        return f"{self.num_classes} classes of {self.in_channels}×{self.image_size[0]}×{self.image_size[1]} images"


class ModelConfig(Config):
    """Settings of a classifier: its backbone and the defence around it."""

    backbone: str = "resnet_mini"
    """A timm model name; `resnet_mini`; `package.module:factory` for a function that returns your own network with its
    weights (imported from the working directory or installed packages, also when the model is loaded); `custom` for a
    module passed in Python; or the authors' networks with the number of blocks in each stage:
    `published_resnet_3_4_23_3`, `published_resnext_3_4_6_3`."""
    stages: tuple[str, ...] | None = None
    """Names of the modules where stages end, stem first; None takes timm's, or those of a ResNet."""
    defence: Literal["fpd", "none"] = "fpd"
    """`fpd` wraps the backbone in a Feature Pyramid Decoder; `none` is its undefended baseline."""
    pretrained: bool = False
    """Load timm's pretrained weights into the backbone."""
    small_stem: Literal[True, False, "auto", "new"] = "new"
    """Remove the downsampling before the pyramid's finest map; `auto`: if a side of the image is
    shorter than 64 pixels; `new`: as `auto`, but only for a backbone created by name without pretrained weights, so
    that your own network is not changed.
    """
    activation: Literal["elu", "keep"] = "keep"
    """`elu` (published) replaces the backbone's activation modules; `keep` keeps them."""
    tail: Literal["own", "pooling"] = "own"
    """Layers after the last stage: the network's own, of which only the last linear one is new where the number of
    classes differs, or (published) global average pooling and a new head."""
    denoise: Denoise = "none"
    """Inner denoising layers; `dot` is the published one, `normalised` divides it by the norm of its affinity.
    `middle` uses the same affinity (dot-product for `bottleneck` and `none`)."""
    denoise_gate: bool = True
    """Multiply the non-local means, inner and middle, by learned numbers that are 0 at initialisation."""
    denoise_after: tuple[int, ...] = (0, 1)
    """Indices of the stages after which a denoising layer is inserted. 0 is the stem and 1 the published A₁ where timm
    lists a stem (ResNets: before the max pool); families with four stages, such as ConvNeXt, list none, and 0 is A₁."""
    middle: Middle = "none"
    """Middle denoising: add the non-local means of the input (published code), of the restored image, or nothing."""
    pyramid_reads: Literal["denoised", "raw"] = "denoised"
    """Input of the pyramid from a stage with a denoising layer: the denoised map, or (published code) the map before
    it. The next stage always reads the denoised map."""
    front_stages: int | None = Field(default=1, ge=1)
    """Number of stages that the front pass runs; the pyramid reads the last four of them. None (published) runs all."""
    restoration: Literal["residual", "image"] = "residual"
    """The decoder's output R(c2…c5): `x′ = x + s R` with R = 0 at initialisation, or (published) `x′ = R`."""
    restoration_scale: float = Field(default=0.1, gt=0)
    """residual: the factor s, in pixels of [0, 1], of the order of the noise. Adam's steps do not shrink with the
    gradient, so a small s keeps one step from changing the image by more than the noise does."""
    pyramid_channels: int | None = Field(default=16, ge=1)
    """Width P of the pyramid; None takes a quarter of the last front stage's channels, within 32 and 256."""
    unstrided_kernel: Literal[2, 3, None] = None
    """Kernel of the decoder's transposed convolutions that keep the size: 3, or 2 (published ResNeXt), which takes two
    of them; None leaves them out: layers in a row without a nonlinearity compute no more than one."""
    head: Head = "linear"
    """Classification layer; `tanh` is the published one. With `tail: own`, the network's own last linear layer,
    unchanged or bounded."""
    lipschitz: float = Field(default=1.0, gt=0)
    """L2 Lipschitz bound of the `spectral` and `orthogonal` heads."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability before the head, in training."""
    normalise: Literal["each_pass", "once"] = "each_pass"
    """Where mean and std apply: at the input of each pass, or (published CALTECH) once at the input of the model, so
    that restoration and middle denoising work on normalised images."""
    mean: tuple[float, ...] | None = None
    """Per-channel mean subtracted inside the model; None: timm's when pretrained, else 0."""
    std: tuple[float, ...] | None = None
    """Per-channel standard deviation divided by inside the model; None: timm's when pretrained, else 1."""

    def baseline(self) -> ModelConfig:
        """Return the settings of the undefended baseline: no FPD and the backbone's own activations."""
        return self.model_copy(update={"defence": "none", "activation": "keep"})


class AugmentConfig(Config):
    """Augmentation of training images, drawn per image."""

    rotation: float = Field(default=0.0, ge=0)
    """Largest rotation in degrees, either way."""
    translation: float = Field(default=0.0, ge=0, le=1)
    """Largest shift as a fraction of each side."""
    flip: bool = False
    """Mirror half of the images left to right."""
    crop: float = Field(default=1.0, gt=0, le=1)
    """Smallest area of a random crop, as a fraction of the image; 1 does not crop. Aspect ratios are 3/4 to 4/3."""
    expand: bool = False
    """Shrink a rotated image until it fits, instead of cutting its corners."""
    brightness: float = Field(default=0.0, ge=0, le=1)
    """Pixels are multiplied by a factor in 1 ± this."""
    contrast: float = Field(default=0.0, ge=0, le=1)
    """Differences from the image's mean are multiplied by a factor in 1 ± this."""


class DataConfig(Config):
    """The data set and its splits."""

    dataset: str = "digits"
    """Name of a data set; `robustfpd datasets` lists them. `folder` is any folder of class folders."""
    root: str = "data"
    """Folder where torchvision keeps its data sets, or the `folder` data set itself; not used by `digits`."""
    download: bool = False
    """Download the data set into `root` if it is missing."""
    cache: str | None = None
    """Folder for decoded and resized images; None: ROBUSTFPD_CACHE, else the user's cache folder."""
    image_size: Size | None = None
    """Height and width of the network's input; an int in YAML means a square, None the data set's own."""
    stored_size: Size | None = None
    """Height and width of the cached images; larger than `image_size` leaves room for crops. None: `image_size`."""
    channels: Literal[1, 3, None] = None
    """Channels of the network's input; 3 repeats grey images. None: the data set's own."""
    background: bool = False
    """CALTECH: the folder of background images is one more class (as published)."""
    split: Literal["stratified", "published"] = "stratified"
    """Data sets without a test set: draw it from each class by `split_seed`, or take the last files of each class."""
    test_fraction: float = Field(default=0.1, gt=0, lt=0.9)
    """Data sets without a test set: fraction of each class in the test set."""
    selection: Literal["held_out", "test"] = "held_out"
    """Validation images, which select the best epoch: held out of training, or (as published) the test images."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.9)
    """Fraction of the training images of each class in the validation set."""
    split_seed: int = 0
    """Seed of the split, separate from the run's seed so that runs share their test images."""
    train_limit: int | None = Field(default=None, ge=2)
    """Largest number of training images."""
    on_bad_image: Literal["error", "skip"] = "error"
    """A file that cannot be decoded ends the run with an error, or is skipped with a warning."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of training images."""


class EvaluationConfig(Config):
    """Defaults of `robustfpd evaluate`."""

    suite: str = "quick"
    """Suite of attacks; `robustfpd.evaluation.suite_names()` lists them."""
    norm: Norm = "linf"
    """Norm of the perturbation."""
    eps: tuple[float, ...] = (8 / 255,)
    """Radii of the perturbation, in pixels of [0, 1]."""
    num_images: int = Field(default=1000, ge=1)
    """Number of test images, the first after a seeded shuffle."""
    space: Literal["pixels", "normalised"] = "pixels"
    """Space of eps and of clipping to [0, 1]: pixels, or (published CALTECH) after normalisation."""
    divide_by: int | None = Field(default=None, ge=1)
    """Count that the published evaluation divides by, independent of the images attacked; an additional accuracy."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if not self.eps:
            raise ValueError("eps must hold at least one radius")
        for eps in self.eps:
            check_eps(eps, self.norm)
        return self


class RunConfig(Config):
    """Settings of a run: data, model, training, evaluation and seed."""

    recipe: str = "custom"
    """Name of the recipe."""
    protocol: Protocol = "improved"
    """`corrected` is the paper's network, `published` reproduces the authors' code; docs/protocols.md lists the
    differences."""
    stage: StageName = "two-phase"
    """Stage of training."""
    seed: int = 0
    """Seed of weights, order, noise, augmentation and attacks."""
    data: DataConfig = DataConfig()
    """Data set and splits."""
    model: ModelConfig = ModelConfig()
    """Model settings."""
    training: TrainingConfig = TrainingConfig()
    """Two-phase training; its loss weights, gate and second pass apply to adversarial training as well."""
    adversarial: AdversarialConfig = AdversarialConfig()
    """Adversarial training."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Evaluation settings."""

    @property
    def procedure(self) -> ProcedureConfig:
        """Settings of the run's stage."""
        return self.adversarial if self.stage == "adversarial" else self.training

    @property
    def steps_per_batch(self) -> dict[Literal["training", "adversarial"], float]:
        """Mean number of an FPD's optimizer steps per batch in each stage, with an open gate."""
        separate = self.training.second_pass != "joint"
        second = 1 / self.training.second_pass_interval if separate and self.adversarial.second_pass else 0.0
        return {"training": 1 + separate * self.training.batch_shares[2], "adversarial": 1 + second}

    def baseline(self) -> RunConfig:
        """Return the undefended baseline's run: same data, noise and number of optimizer steps, no defence.

        If phase 2 is a separate step, the baseline trains for more epochs, twice as many if it follows every batch,
        rounded to whole epochs, with proportionally more patience. While the gate is shut, and in clean epochs before
        the first attack, the FPD takes one step per batch, so the baseline takes slightly more steps.
        """
        steps = self.steps_per_batch
        training, adversarial = self.training.longer(steps["training"]), self.adversarial.longer(steps["adversarial"])
        update = {"model": self.model.baseline(), "training": training, "adversarial": adversarial}
        return self.model_copy(update=update)

    def save(self, path: Path) -> None:
        """Write the settings as YAML."""
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
