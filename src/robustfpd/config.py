"""Every setting of a run: frozen pydantic models, read from YAML, overridden by `field=value`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from robustfpd.errors import InputError, unknown_name

Norm = Literal["linf", "l2", "l1"]
Denoise = Literal["dot", "bottleneck", "softmax", "gaussian", "none"]
Middle = Literal["input", "restored", "none"]
Head = Literal["tanh", "spectral", "orthogonal", "linear"]

NORMS: tuple[str, ...] = get_args(Norm)
CUSTOM_BACKBONE = "custom"
"""`ModelConfig.backbone` of a network that the user handed over as a module."""


class Config(BaseModel):
    """Base of all settings: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


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
        if isinstance(values, Mapping) and isinstance(values.get("image_size"), int):
            return {**values, "image_size": (values["image_size"],) * 2}
        return values

    @model_validator(mode="after")
    def _positive(self) -> TaskConfig:
        if min(self.image_size) < 1:
            raise ValueError(f"image_size must be positive, found {self.image_size}")
        return self


class ModelConfig(Config):
    """A classifier: its backbone and the defence around it."""

    backbone: str = "resnet_mini"
    """A timm model name, `resnet_mini`, or `custom` for a module that is handed over in Python."""
    stages: tuple[str, ...] | None = None
    """Names of the modules where stages end, stem first; None asks timm."""
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
    pyramid_channels: int | None = Field(default=None, ge=1)
    """Width P of the pyramid; None takes a quarter of the last stage's channels, within 32 and 256."""
    head: Head = "tanh"
    """Classification layer: `tanh` is the published one."""
    lipschitz: float = Field(default=1.0, gt=0)
    """L2 Lipschitz bound of the `spectral` and `orthogonal` heads."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability before the head, in training."""
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
    brightness: float = Field(default=0.0, ge=0, le=1)
    """Pixels are multiplied by a factor within 1 plus or minus this."""


class DataConfig(Config):
    """Which images, and how they are split."""

    dataset: str = "digits"
    """Name of a data set; `robustfpd.data.names()` lists them."""
    root: str = "data"
    """Folder where torchvision keeps its data sets; not used by `digits`."""
    download: bool = False
    """Fetch the data set into `root` when it is not there."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=0.9)
    """Share of the training images of each class held out for early stopping."""
    split_seed: int = 0
    """Seed of the split; kept apart from the run's seed so that runs share their test images."""
    train_limit: int | None = Field(default=None, ge=2)
    """Train on this many images only."""
    augment: AugmentConfig = AugmentConfig()
    """Augmentation of training images."""


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


class TrainingConfig(Config):
    """The training procedure (published defaults)."""

    epochs: int = Field(default=100, ge=1)
    """Passes over the training images."""
    batch_size: int = Field(default=128, ge=2)
    """Images a step."""
    noise: float = Field(default=0.01, ge=0)
    """Half-width of the uniform noise added to training images, in pixels of [0, 1]."""
    threshold: float = Field(default=3.0, ge=0)
    """T: while the restoration loss is above it, only the front pass and the restoration learn."""
    alpha_ce: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy in both phases."""
    alpha_restore: float = Field(default=1.0, ge=0)
    """Weight of the restoration loss in phase 1."""
    alpha_restore_second: float = Field(default=1.0, ge=0)
    """Weight of the restoration loss in phase 2."""
    second_pass: Literal["detached", "joint"] = "detached"
    """`detached`: phase 2 is a step of its own; `joint`: both phases in one backward and one step."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule and rate."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Course of the learning rate."""
    clip: float | None = Field(default=10.0, gt=0)
    """Largest L2 norm of the gradient; None does not clip."""
    early_stop_patience: int | None = Field(default=20, ge=1)
    """Epochs without a better validation accuracy (or an equal one with a lower loss) before training stops.

    None never stops early.
    """


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

    @model_validator(mode="after")
    def _radii(self) -> EvaluationConfig:
        if not self.eps or min(self.eps) <= 0 or (self.norm == "linf" and max(self.eps) > 1):
            raise ValueError(f"eps must hold positive radii, in linf at most 1 (8/255 is 0.0314), found {self.eps}")
        return self


class RunConfig(Config):
    """One run: data, model, training, evaluation and the seed of every random draw."""

    recipe: str = "custom"
    """Name of the recipe this came from."""
    seed: int = 0
    """Seed of weights, order, noise, augmentation and attacks."""
    data: DataConfig = DataConfig()
    """Images."""
    model: ModelConfig = ModelConfig()
    """Classifier."""
    training: TrainingConfig = TrainingConfig()
    """Procedure."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Attacks."""

    def twin(self) -> RunConfig:
        """The plain twin's run: same data, noise and number of optimiser steps, no defence.

        A detached second phase is an optimiser step of its own, so the twin runs twice the epochs, with twice the
        patience. Where the gate was shut the FPD took one step, so the twin has a few more.
        """
        factor = 2 if self.training.second_pass == "detached" else 1
        old = self.training
        patience = None if old.early_stop_patience is None else old.early_stop_patience * factor
        schedule = old.schedule.model_copy(update={"patience": old.schedule.patience * factor})
        training = old.model_copy(
            update={"epochs": old.epochs * factor, "early_stop_patience": patience, "schedule": schedule}
        )
        return self.model_copy(update={"model": self.model.twin(), "training": training})

    def save(self, path: Path) -> None:
        """Write the settings as YAML."""
        partial = path.with_name(path.name + ".new")
        partial.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
        partial.replace(path)


C = TypeVar("C", bound=Config)


def parse(cls: type[C], values: Mapping[str, Any], source: str = "") -> C:
    """Build `cls` from plain values; a ValueError names the field, what was found and what fits."""
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        raise _explain(cls, error, source) from None


def load_run(path: Path) -> RunConfig:
    """Read a `config.yaml`."""
    return parse(RunConfig, _read_yaml(path), source=str(path))


RECIPES = Path(__file__).parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the packaged recipes, `<dataset>/<name>`."""
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))


def recipe(name: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Return a packaged recipe, or the recipe in the YAML file `name`, with `field=value` overrides.

    Args:
        name: a name from `recipe_names()` or a path that ends in .yaml.
        overrides: dotted fields and YAML values, as in `training.epochs=3`.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif name in recipe_names():
        path = RECIPES / f"{name}.yaml"
    else:
        raise unknown_name("recipe", name, recipe_names())
    values: dict[str, Any] = {"recipe": name, **_read_yaml(path)}
    for override in overrides:
        _apply(values, override)
    return parse(RunConfig, values, source=f"recipe {name}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a mapping of settings, found {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    field, separator, text = override.partition("=")
    if not separator or not field:
        raise InputError(f"override {override!r} is not of the form field=value, as in training.epochs=3")
    *parents, leaf = field.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"override {override!r}: {parent} is a value, not a group of settings")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: {text!r} is not a YAML value") from None


def _explain(cls: type[Config], error: ValidationError, source: str) -> InputError:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    where = f" in {source}" if source else ""
    if first["type"] == "extra_forbidden":
        owner = _config_at(cls, location[:-1])
        fields = [".".join([*location[:-1], name]) for name in owner.model_fields]
        problem = unknown_name("field", ".".join(location), fields, listed=40)
        return InputError(f"{problem}{where}")
    found = f", found {first['input']!r}" if first["type"] != "missing" else ""
    message = first["msg"].removeprefix("Value error, ")
    return InputError(f"{'.'.join(location) or cls.__name__}: {message}{found}{where}")


def _config_at(cls: type[Config], location: list[str]) -> type[Config]:
    """Follow a location through nested settings; a number is a place in a tuple of them."""
    for name in location:
        if not name.isdigit():
            annotation = cls.model_fields[name].annotation
            candidates = (annotation, *get_args(annotation))
            cls = next(c for c in candidates if isinstance(c, type) and issubclass(c, Config))
    return cls
