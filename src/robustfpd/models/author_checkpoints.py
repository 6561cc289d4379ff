"""The authors' checkpoints: FPDs on ResNet and ResNeXt, and the plain networks that attack them (Li et al., CVPR 2020).

Names and shapes of the tensors determine the architecture. No code in the file is run.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.config import ModelConfig, TaskConfig, parse, protocol_defaults
from robustfpd.errors import InputError, MissingDataError, first_line
from robustfpd.models.backbones import channel_constants
from robustfpd.models.factory import assemble
from robustfpd.models.fpd import FPD, Baseline

NARROWEST_PYRAMID = 64
"""Channels. The layer after the authors' pyramid always has 64; ours is never wider than the pyramid."""
SMALLEST_SIDE = 8
"""Pixels. For smaller images the sizes of the maps do not determine the decoder's layers."""


@dataclass(frozen=True)
class AuthorCheckpoint:
    """A model read from one of the authors' files."""

    model: FPD | Baseline
    architecture: str
    """For display: `ResNet-101`, `ResNeXt-50 32×4d`."""
    blocks: tuple[int, ...]
    """Number of bottleneck blocks of each of the four stages."""
    epoch: int | None
    """Epoch at which the file was written, as the authors' code counts; None when the file has none."""


@dataclass(frozen=True)
class _Family:
    """One kind of published network and the authors' names of its weights."""

    name: str
    """For display, with a place for the depth."""
    backbone: str
    """Prefix of `ModelConfig.backbone`; block counts follow."""
    stages: tuple[str, ...]
    stem: str
    """The first convolution."""
    last: str
    """A block's third convolution, which basic blocks lack."""
    fc: str
    unstrided_kernel: int
    renamed: tuple[tuple[str, str], ...]
    """Our names → theirs: patterns and replacements, applied in turn."""


_DECODER = (
    (r"^decoder\.laterals\.0", "latlayer3"),
    (r"^decoder\.laterals\.1", "latlayer2"),
    (r"^decoder\.laterals\.2", "latlayer1"),
    (r"^decoder\.laterals\.3", "toplayer"),
    (r"^decoder\.smooth", "smooth3"),
    (r"^decoder\.upscale", "trans_conv"),
)

_RESNET = _Family(
    name="ResNet-{}", backbone="published_resnet", stages=("layer1", "layer2", "layer3", "layer4"),
    stem="group1.conv1.weight", last="group1.conv3.weight", fc="group2.fc", unstrided_kernel=3,
    renamed=(
        *_DECODER,
        (r"^head\.linear", "group2.fc"),
        (r"^backbone\.net\.(layer\d\.\d+)\.(conv|bn)", r"\1.group1.\2"),
        (r"^backbone\.net\.(conv1|bn1)", r"group1.\1"),
        (r"^backbone\.net\.", ""),
    ),
)  # fmt: skip

_RESNEXT = _Family(
    name="ResNeXt-{} 32×4d", backbone="published_resnext", stages=("conv2", "conv3", "conv4", "conv5"),
    stem="conv1.0.weight", last="split_transforms.6.weight", fc="fc", unstrided_kernel=2,
    renamed=(
        *_DECODER,
        (r"^head\.linear", "fc"),
        (r"^backbone\.net\.(conv\d\.\d+)\.residual", r"\1.split_transforms"),
        (r"^backbone\.net\.", ""),
    ),
)  # fmt: skip


def load_published(
    path: str | Path,
    image_size: int | tuple[int, int] | None = None,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> FPD | Baseline:
    """Load one of the authors' checkpoints, in evaluation mode, in float32 on the CPU.

    Args:
        path: `bestmodel_params.pkl` or one of its siblings; a bare state_dict written by torch.save works too.
        image_size: pixels per side, or (height, width), for `model.task`; the network takes any size. The file does
            not contain it: None means 64 for 10 classes and 224 for others, as published.
        mean: mean of each channel that the authors subtracted from the images; not in the file. The model then
            normalises inside and takes images in [0, 1]. CALTECH: (0.485, 0.456, 0.406). None: no normalisation.
        std: standard deviation that they divided by, likewise. CALTECH: (0.229, 0.224, 0.225).

    Returns:
        The FPD, or a `Baseline` for the surrogates of the black-box attacks.

    Raises:
        InputError: the file is missing, damaged, no such network, or refers to code (which is not run).
    """
    return read_author_checkpoint(path, image_size, mean, std).model


def read_author_checkpoint(
    path: str | Path, image_size: int | tuple[int, int] | None = None,
    mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None,
) -> AuthorCheckpoint:  # fmt: skip
    """Load a checkpoint as `load_published` does, and return its architecture and epoch too."""
    path = Path(path)
    weights, epoch = _weights(_unpickled(path), path)
    family = _family(weights, path)
    blocks = tuple(_blocks(weights, stage, path) for stage in family.stages)
    task, config = _settings(weights, family, blocks, image_size, path)
    if mean is not None or std is not None:  # the published restoration and middle denoising see normalised images
        config = config.model_copy(update={"mean": mean, "std": std, "normalise": "once"})
    try:
        with torch.device("meta"):  # shapes are compared before memory and random weights are spent
            model = assemble(task, config)
    except RuntimeError as error:  # sizes beyond memory
        raise InputError(f"{path} describes a network that cannot be built: {first_line(error)}") from None
    theirs = {name: _their_name(name, family) for name in model.state_dict() if name not in ("mean", "std")}
    architecture = family.name.format(3 * sum(blocks) + 2)
    _check_names(weights, set(theirs.values()), config, f"{path} holds a {architecture}")
    state = {name: _converted(weights, key, model.state_dict()[name], path) for name, key in theirs.items()}
    state["mean"] = channel_constants(config.mean or (0.0,), task.in_channels, "mean")
    state["std"] = channel_constants(config.std or (1.0,), task.in_channels, "std")
    model.load_state_dict(state, assign=True)
    model.to(memory_format=torch.channels_last)
    return AuthorCheckpoint(model.eval(), architecture, blocks, epoch)


def _unpickled(path: Path) -> Any:
    """Read a file of torch.save by an unpickler that knows tensors and containers only and calls nothing else."""
    if not path.exists():
        raise MissingDataError(f"no file {path} (looked in {path.resolve().parent}); give a checkpoint of the authors")
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the checkpoint itself, as in {path / 'bestmodel_params.pkl'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats; relevant errors follow
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise InputError(f"{path} cannot be read: permission denied; ask its owner, or copy it") from None
    except Exception as error:  # damaged pickles raise anything; torch's messages suggest running the code
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise InputError(
                f"{path} refers to code ({code[1]}), which weights do not need and which was not run; "
                "give a file of tensors and numbers, as the authors' are"
            ) from None
        raise InputError(f"{path} is damaged or was not written by torch.save; fetch it again") from None


def _weights(content: Any, path: Path) -> tuple[dict[str, Tensor], int | None]:
    """Return the state_dict, names without DataParallel's prefix, and the epoch."""
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a dict with a state_dict, found {type(content).__name__}")
    state = content.get("state_dict", content)
    epoch = content.get("epoch")
    if not isinstance(state, dict):
        raise InputError(f"state_dict in {path} must be a dict of tensors, found {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str):
            raise InputError(f"{path} must name its tensors by strings, found {_shortened(key)}")
        if type(value) not in (Tensor, nn.Parameter):
            raise InputError(f"{_shortened(key)} in {path} must be a tensor, found {type(value).__name__}")
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state), epoch if type(epoch) is int else None


def _family(weights: Mapping[str, Tensor], path: Path) -> _Family:
    for family in (_RESNET, _RESNEXT):
        if not any(key.startswith(f"{family.stages[0]}.") for key in weights):
            continue
        if not any(key.endswith(f".{family.last}") for key in weights):
            raise InputError(
                f"{path} has basic blocks ({family.stages[0]}.0.{family.last} is missing); "
                "only networks of bottleneck blocks were published, such as ResNet-50 and ResNet-101"
            )
        return family
    names = ", ".join(_shortened(key) for key in list(weights)[:3]) or "nothing"
    raise InputError(
        f"{path} holds no published network: expected names such as layer1.0.{_RESNET.last} (ResNet) or "
        f"conv2.0.{_RESNEXT.last} (ResNeXt), found {names}"
    )


def _blocks(weights: Mapping[str, Tensor], stage: str, path: Path) -> int:
    """Return the number of blocks of a stage."""
    pattern = re.compile(rf"{stage}\.(0|[1-9]\d{{0,2}})\.", re.ASCII)
    blocks = {int(match[1]) for key in weights if (match := pattern.match(key))}
    missing = next(i for i in range(len(blocks) + 1) if i not in blocks)
    if not blocks or missing < len(blocks):
        rest = f"found blocks {sorted(blocks)[:8]}" if blocks else "found none of its blocks"
        raise InputError(f"{path} lacks {stage}.{missing}: {rest}; give the authors' whole file")
    return len(blocks)


def _settings(
    weights: Mapping[str, Tensor], family: _Family, blocks: tuple[int, ...],
    image_size: int | tuple[int, int] | None, path: Path,
) -> tuple[TaskConfig, ModelConfig]:  # fmt: skip
    """Return what to build: an FPD where the file has decoder weights besides the surrogates' unused `toplayer`."""
    defended = any(key.startswith(("latlayer", "smooth", "trans_conv")) for key in weights)
    classes = _shape(weights, f"{family.fc}.weight", "K×C", path)[0]
    size = (64 if classes == 10 else 224) if image_size is None else image_size
    in_channels = _shape(weights, family.stem, "64×C×h×w", path)[1]
    task = parse(
        TaskConfig, {"num_classes": classes, "in_channels": in_channels, "image_size": size}, f"reading {path}"
    )
    if min(task.image_size) < SMALLEST_SIDE:
        raise InputError(f"image_size must be at least {SMALLEST_SIDE} pixels a side, found {task.image_size}")
    values: dict[str, Any] = protocol_defaults("published", "model") | {
        "backbone": "_".join(map(str, (family.backbone, *blocks))), "small_stem": False, "dropout": 0.5,
        "pyramid_reads": "raw", "unstrided_kernel": family.unstrided_kernel,
    }  # fmt: skip
    if defended:
        width = values["pyramid_channels"] = _shape(weights, "toplayer.weight", "P×C×1×1", path)[0]
        if width < NARROWEST_PYRAMID:
            raise InputError(
                f"toplayer.weight in {path} has {width} channels, expected {NARROWEST_PYRAMID} or more; "
                "128 and 256 were published"
            )
    else:
        values |= {"defence": "none", "activation": "keep"}
    return task, parse(ModelConfig, values, f"reading {path}")


def _shape(weights: Mapping[str, Tensor], key: str, expected: str, path: Path) -> torch.Size:
    """Return the shape of a required tensor, which must have as many axes as `expected`."""
    if key not in weights:
        raise InputError(f"{path} lacks {key}; give the authors' whole file")
    shape = weights[key].shape
    if len(shape) != expected.count("×") + 1:
        raise InputError(f"{key} in {path} has shape {tuple(shape)}, expected {expected}")
    return shape


def _their_name(name: str, family: _Family) -> str:
    """Return the authors' name of our parameter."""
    for pattern, replacement in family.renamed:
        name = re.sub(pattern, replacement, name)
    return name


def _check_names(weights: Mapping[str, Tensor], expected: set[str], config: ModelConfig, subject: str) -> None:
    """Require exactly the model's parameters in the file; batch norm counters, new in torch 0.4.1, may be missing."""
    kind = "without a decoder" if config.defence == "none" else "with a Feature Pyramid Decoder"
    unused = {"toplayer.weight", "toplayer.bias"} if config.defence == "none" else set()
    missing = sorted(key for key in expected - weights.keys() if not key.endswith("num_batches_tracked"))
    extra = sorted(weights.keys() - expected - unused)
    for keys, verb in ((missing, "lacks"), (extra, "has no place for")):
        if keys:
            more = f" and {len(keys) - 2} more" if len(keys) > 2 else ""
            named = ", ".join(map(_shortened, keys[:2]))
            raise InputError(f"{subject} {kind}, which {verb} {named}{more}; give the authors' unchanged file")


def _converted(weights: Mapping[str, Tensor], key: str, like: Tensor, path: Path) -> Tensor:
    """Return a copy of a tensor of the file as float32 (counters as int64)."""
    if key not in weights:
        return torch.zeros(like.shape, dtype=like.dtype)
    value = weights[key]
    if value.shape != like.shape:
        raise InputError(f"{key} in {path} has shape {tuple(value.shape)}, expected {tuple(like.shape)}")
    plain = value.layout == torch.strided and not value.is_meta and not value.is_quantized
    if not plain or value.is_floating_point() != like.is_floating_point() or value.is_complex():
        kind = f"{str(value.dtype).removeprefix('torch.')} on {value.device.type}, {value.layout}"
        raise InputError(f"{key} in {path} must be a dense tensor of {like.dtype} or similar, found {kind}")
    converted = value.detach().to(like.dtype).clone(memory_format=torch.contiguous_format)
    if not bool(converted.isfinite().all()):
        raise InputError(f"{key} in {path} holds NaN or infinite values: training diverged, or the file is damaged")
    if key.endswith("running_var") and float(converted.min()) < 0:
        raise InputError(f"{key} in {path} must be variances of at least 0, found {float(converted.min()):.3g}")
    return converted


def _shortened(key: object) -> str:
    """Return a name from the file, shortened to fit in a message."""
    text = ascii(key)[1:-1] if isinstance(key, str) else ascii(key)
    return text if len(text) <= 60 else f"{text[:57]}..."
