"""The authors' checkpoints as ours: FPDs on ResNet and ResNeXt, and the plain networks that attack them.

Li et al., CVPR 2020. Names and shapes in the file say what network it is; nothing in it is executed.
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

from robustfpd.config import ModelConfig, TaskConfig, parse
from robustfpd.errors import InputError, MissingDataError, first_line
from robustfpd.models.backbones import channel_constants
from robustfpd.models.factory import assemble
from robustfpd.models.fpd import FPD, Baseline

NARROWEST_PYRAMID = 64
"""Channels. Our decoder's later layers are never wider than its pyramid, the authors' next one has 64 always."""
SMALLEST_SIDE = 8
"""Pixels. Under it the maps' sizes no longer tell the decoder how often to double."""


@dataclass(frozen=True)
class AuthorCheckpoint:
    """A model read from one of the authors' files, and what the file tells beside it."""

    model: FPD | Baseline
    architecture: str
    """For people: `ResNet-101`, `ResNeXt-50 32×4d`."""
    blocks: tuple[int, ...]
    """Bottleneck blocks in each of the four stages."""
    epoch: int | None
    """Epoch at which the file was written, counted as the authors' code did; None when it does not say."""


@dataclass(frozen=True)
class _Family:
    """One kind of published network and how its weights are called."""

    name: str
    """Shown to people, with the depth in it."""
    backbone: str
    """Prefix of `ModelConfig.backbone`; block counts follow."""
    stages: tuple[str, ...]
    stem: str
    """The first convolution."""
    last: str
    """A block's third convolution, which basic blocks do not have."""
    fc: str
    unstrided_kernel: int
    renamed: tuple[tuple[str, str], ...]
    """Our names → theirs; patterns and replacements, applied in turn."""


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
        path: `bestmodel_params.pkl` or one of its siblings; a bare state_dict that torch.save wrote will do.
        image_size: pixels a side, or (height, width), that `model.task` states; any size goes through the network.
            The file does not tell: None takes 64 for 10 classes and 224 for others, as published.
        mean: what the authors subtracted from each channel, and
        std: divided by, before the network saw an image; the file does not tell. The model then does it itself and
            takes images in [0, 1]. CALTECH: (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225). None: as the file's
            network takes them.

    Returns:
        The FPD, or a `Baseline` network for the surrogates of the black-box attacks.

    Raises:
        InputError: the file is missing, damaged, no such network, or refers to code (which is not run).
    """
    return read_author_checkpoint(path, image_size, mean, std).model


def read_author_checkpoint(
    path: str | Path,
    image_size: int | tuple[int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> AuthorCheckpoint:
    """Load a checkpoint as `load_published` does, and tell what was found in it."""
    path = Path(path)
    weights, epoch = _weights(_unpickled(path), path)
    family = _family(weights, path)
    blocks = tuple(_blocks(weights, stage, path) for stage in family.stages)
    _check_bottleneck(weights, family, path)
    task, config = _settings(weights, family, blocks, image_size, path)
    if mean is not None or std is not None:  # the published restoration and middle denoising see normalised images
        config = config.model_copy(update={"mean": mean, "std": std, "normalise": "once"})
    try:
        with torch.device("meta"):  # shapes are compared before there is memory or random weights for them
            model = assemble(task, config)
    except RuntimeError as error:  # sizes beyond any computer's
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
    """What torch.save wrote, read by an unpickler that knows tensors and containers and calls nothing else."""
    if not path.exists():
        raise MissingDataError(f"no file {path} (looked in {path.resolve().parent}); give a checkpoint of the authors")
    if not path.is_file():
        raise InputError(f"{path} is not a file; give the checkpoint itself, as in {path / 'bestmodel_params.pkl'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats; what matters of them is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise InputError(f"{path} cannot be read: permission denied; ask its owner, or copy it") from None
    except Exception as error:  # a damaged pickle raises anything; torch's own words advise to run the code in it
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise InputError(
                f"{path} refers to code ({code[1]}), which weights do not need and which was not run; "
                "give a file of tensors and numbers, as the authors' are"
            ) from None
        raise InputError(
            f"{path} is damaged or was not written by torch.save, and cannot be read; fetch it again"
        ) from None


def _weights(content: Any, path: Path) -> tuple[dict[str, Tensor], int | None]:
    """The state_dict with names freed of DataParallel's prefix, and the epoch."""
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
        if any(key.startswith(f"{family.stages[0]}.") for key in weights):
            return family
    found = ", ".join(_shortened(key) for key in list(weights)[:3]) or "nothing"
    raise InputError(
        f"{path} holds no published network: expected names such as layer1.0.{_RESNET.last} (ResNet) or "
        f"conv2.0.{_RESNEXT.last} (ResNeXt), found {found}"
    )


def _blocks(weights: Mapping[str, Tensor], stage: str, path: Path) -> int:
    """How many blocks a stage has."""
    pattern = re.compile(rf"{stage}\.(0|[1-9]\d{{0,2}})\.", re.ASCII)
    found = {int(match[1]) for key in weights if (match := pattern.match(key))}
    missing = next(i for i in range(len(found) + 1) if i not in found)
    if not found or missing < len(found):
        rest = f"found blocks {sorted(found)[:8]}" if found else "found none of its blocks"
        raise InputError(f"{path} lacks {stage}.{missing}: {rest}; give the authors' whole file")
    return len(found)


def _check_bottleneck(weights: Mapping[str, Tensor], family: _Family, path: Path) -> None:
    if not any(key.endswith(f".{family.last}") for key in weights):
        raise InputError(
            f"{path} has basic blocks ({family.stages[0]}.0.{family.last} is not there); "
            "only networks of bottleneck blocks were published, such as ResNet-50 and ResNet-101"
        )


def _settings(
    weights: Mapping[str, Tensor],
    family: _Family,
    blocks: tuple[int, ...],
    image_size: int | tuple[int, int] | None,
    path: Path,
) -> tuple[TaskConfig, ModelConfig]:
    """What to build. A file with any of the decoder but the surrogates' unused `toplayer` is meant to be an FPD."""
    defended = any(key.startswith(("latlayer", "smooth", "trans_conv")) for key in weights)
    classes = _shape(weights, f"{family.fc}.weight", "K×C", path)[0]
    size = (64 if classes == 10 else 224) if image_size is None else image_size
    in_channels = _shape(weights, family.stem, "64×C×h×w", path)[1]
    task = parse(
        TaskConfig, {"num_classes": classes, "in_channels": in_channels, "image_size": size}, f"reading {path}"
    )
    if min(task.image_size) < SMALLEST_SIDE:
        raise InputError(f"image_size must be at least {SMALLEST_SIDE} pixels a side, found {task.image_size}")
    values: dict[str, Any] = {
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
    """The shape of a tensor that must be there, with as many axes as `expected` shows."""
    if key not in weights:
        raise InputError(f"{path} lacks {key}; give the authors' whole file")
    shape = weights[key].shape
    if len(shape) != expected.count("×") + 1:
        raise InputError(f"{key} in {path} has shape {tuple(shape)}, expected {expected}")
    return shape


def _their_name(name: str, family: _Family) -> str:
    """What the authors call our parameter."""
    for pattern, replacement in family.renamed:
        name = re.sub(pattern, replacement, name)
    return name


def _check_names(weights: Mapping[str, Tensor], expected: set[str], config: ModelConfig, subject: str) -> None:
    """Every parameter must be in the file and nothing else; batch norm's counters came with torch 0.4.1."""
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
    """A tensor of the file as float32 (counters as int64), with memory of its own."""
    if key not in weights:
        return torch.zeros(like.shape, dtype=like.dtype)
    value = weights[key]
    if value.shape != like.shape:
        raise InputError(f"{key} in {path} has shape {tuple(value.shape)}, expected {tuple(like.shape)}")
    plain = value.layout == torch.strided and not value.is_meta and not value.is_quantized
    if not plain or value.is_floating_point() != like.is_floating_point() or value.is_complex():
        kind = f"{str(value.dtype).removeprefix('torch.')} on {value.device.type}, {value.layout}"
        raise InputError(f"{key} in {path} must be a dense tensor of {like.dtype} or its like, found {kind}")
    converted = value.detach().to(like.dtype).clone(memory_format=torch.contiguous_format)
    if not bool(converted.isfinite().all()):
        raise InputError(f"{key} in {path} holds NaN or infinite values: a training that diverged, or a damaged file")
    if key.endswith("running_var") and float(converted.min()) < 0:
        raise InputError(f"{key} in {path} must be variances of 0 and more, found {float(converted.min()):.3g}")
    return converted


def _shortened(key: object) -> str:
    """A name from the file, fit for one line."""
    text = ascii(key)[1:-1] if isinstance(key, str) else ascii(key)
    return text if len(text) <= 60 else f"{text[:57]}..."
