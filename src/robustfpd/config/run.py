"""Every setting of a run, as frozen pydantic models: one field, one docstring."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, model_validator

from robustfpd.config.base import Config, Denoise, Head, Middle, Norm, Protocol, StageName
from robustfpd.config.procedure import AdversarialConfig, ProcedureConfig, TrainingConfig


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
    that is handed over in Python, or the authors' networks: `published_resnet_3_4_23_3`, `published_resnext_3_4_6_3`,
    with the number of blocks in each stage."""
    stages: tuple[str, ...] | None = None
    """Names of the modules where stages end, stem first; None asks timm, or takes those of a ResNet."""
    defence: Literal["fpd", "none"] = "fpd"
    """`fpd` wraps the backbone in a Feature Pyramid Decoder; `none` is its plain twin."""
    pretrained: bool = False
    """Load timm's pretrained weights into the backbone."""
    small_stem: Literal[True, False, "auto"] = "auto"
    """Remove the downsampling before the pyramid's finest map; `auto`: when a side is under 64 pixels."""
    activation: Literal["elu", "keep"] = "elu"
    """`elu` replaces the backbone's activation modules; `keep` leaves them as they are."""
    denoise: Denoise = "dot"
    """Inner denoising layers; `middle` takes the same affinity (dot-product for `bottleneck` and `none`)."""
    denoise_after: tuple[int, ...] = (0, 1)
    """Indices of the stages after which a denoising layer is implanted.

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

    def twin(self) -> ModelConfig:
        """The same network without the defence: no implants, its own activations, plain logits."""
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
    """What `robustfpd evaluate` does unless told otherwise."""

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
    """Count that the published evaluation divides by, whatever it attacked; shown beside the true accuracy."""

    @model_validator(mode="after")
    def _radii(self) -> EvaluationConfig:
        if not self.eps or min(self.eps) <= 0 or (self.norm == "linf" and max(self.eps) > 1):
            raise ValueError(f"eps must hold positive radii, in linf at most 1 (8/255 is 0.0314), found {self.eps}")
        return self


class RunConfig(Config):
    """One run: data, model, training, evaluation and the seed of every random draw."""

    recipe: str = "custom"
    """Name of the recipe this came from."""
    protocol: Protocol = "corrected"
    """`published` repeats what the authors' code does; docs/protocols.md tells each difference."""
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

    @model_validator(mode="after")
    def _maps_to_share(self) -> RunConfig:
        if self.training.second_pass == "shared" and self.model.pyramid_reads == "raw":
            raise ValueError(
                "training.second_pass=shared needs model.pyramid_reads=denoised: the maps it shares are those that "
                "the next stage reads"
            )
        return self

    @property
    def procedure(self) -> ProcedureConfig:
        """Epochs, optimiser and the like of this run's stage."""
        return self.adversarial if self.stage == "adversarial" else self.training

    def twin(self) -> RunConfig:
        """The plain twin's run: same data, noise and number of optimiser steps, no defence.

        Where the FPD's second pass is an optimiser step of its own, the twin runs more epochs, twice as many if it
        follows every batch, and has as much more patience. Where the gate was shut, and in clean epochs before the
        first attack, the FPD took one step, so the twin has a few more.
        """
        longer = self.training.steps_per_batch
        return self.model_copy(
            update={
                "model": self.model.twin(),
                "training": _longer(self.training, longer),
                "adversarial": _longer(self.adversarial, longer if self.adversarial.second_pass else 1),
            }
        )

    def save(self, path: Path) -> None:
        """Write the settings as YAML."""
        partial = path.with_name(path.name + ".new")
        partial.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
        partial.replace(path)


P = TypeVar("P", bound=ProcedureConfig)


def _longer(old: P, factor: float) -> P:
    """The same procedure over `factor` times the epochs."""
    patience = None if old.early_stop_patience is None else round(old.early_stop_patience * factor)
    schedule = old.schedule.model_copy(update={"patience": round(old.schedule.patience * factor)})
    return old.model_copy(
        update={"epochs": round(old.epochs * factor), "early_stop_patience": patience, "schedule": schedule}
    )
