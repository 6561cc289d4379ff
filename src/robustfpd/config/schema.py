"""The settings of a run, as frozen pydantic models: one docstring per field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from robustfpd.config.base import Config, Norm, check_eps
from robustfpd.config.training import AdversarialConfig, ProcedureConfig, TrainingConfig
from robustfpd.io import write_text

Denoise = Literal["normalised", "dot", "bottleneck", "softmax", "gaussian", "none"]
Middle = Literal["input", "restored", "none"]
Head = Literal["tanh", "spectral", "orthogonal", "linear"]
StageName = Literal["two-phase", "adversarial"]
Protocol = Literal["improved", "corrected", "published"]
Precision = Literal["auto", "fp32", "bf16"]

STAGES: tuple[str, ...] = get_args(StageName)
PRECISIONS: tuple[str, ...] = get_args(Precision)
DATASETS = ("caltech101", "caltech256", "cifar10", "digits", "fashion_mnist", "folder", "mnist", "svhn")
"""Names of the data sets in `robustfpd.data`, listed here so that the command line needs no torch."""
SUITES = (
    "autoattack", "autoattack-plus", "autoattack-rand", "first-look", "full", "pgd-100", "published", "published-mnist",
    "quick", "standard",
)  # fmt: skip
"""Names of the suites in `robustfpd.evaluation`."""
DEVICES = ("auto", "cpu", "cuda", "mps")
"""Device types; an index follows a colon, as in `cuda:1`."""
CUSTOM_BACKBONE = "custom"
"""`ModelConfig.backbone` of a module that the user passes as `net`."""


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
    """A timm model name; `resnet_mini` or `conv_mini`, also with a width as in `conv_mini_48`;
    `package.module:factory` for a function that returns your own network with its weights (imported from the working
    directory or installed packages, also when the model is loaded); `custom` for a module passed in Python; or the
    authors' networks with the number of blocks in each stage: `published_resnet_3_4_23_3`,
    `published_resnext_3_4_6_3`."""
    stages: tuple[str, ...] | None = None
    """Names of the modules where stages end, stem first; None takes timm's, or those of a ResNet."""
    defence: Literal["fpd", "none"] = "fpd"
    """`fpd` wraps the backbone in a Feature Pyramid Decoder; `none` is its undefended baseline."""
    pretrained: bool = False
    """Load timm's pretrained weights into the backbone."""
    small_stem: Literal[True, False, "auto", "new", "pool"] = "new"
    """Remove the downsampling before the pyramid's finest map; `pool`: remove only pooling layers there; `auto`: all of
    it, if a side of the image is shorter than 64 pixels; `new`: as `auto`, but only for a backbone created by name
    without pretrained weights, so that your own network is not changed."""
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
    pass_statistics: Literal["own", "shared"] = "own"
    """Running averages of the batch norms in evaluation: each pass has its own, or (published) both update one."""
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
    pad: int = Field(default=0, ge=0)
    """Pad each side with this many black pixels, then crop to the original size at a random position, as torchvision's
    `RandomCrop(padding=…)`."""
    cutout: float = Field(default=0.0, ge=0, le=1)
    """Height and width of a black rectangle at a random position, as fractions of the image's (DeVries & Taylor, 2017,
    arXiv 1708.04552)."""
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
    """Radii of the perturbation, in pixels of [0, 1]; at 0 no attack is run."""
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
            check_eps(eps, self.norm, zero=True)
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
