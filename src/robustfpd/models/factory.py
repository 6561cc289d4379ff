"""`enhance` builds a defended classifier, `load` reads one back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustfpd.config import CUSTOM_BACKBONE, ModelConfig, TaskConfig, parse
from robustfpd.errors import InputError
from robustfpd.models.backbones import from_module, from_timm
from robustfpd.models.checkpoint import read_settings, read_weights, whole
from robustfpd.models.fpd import FPD, Baseline
from robustfpd.models.import_model import check_trusted, foreign, is_foreign
from robustfpd.models.mode import evaluating
from robustfpd.models.zoo import locate
from robustfpd.rng import derive, generator


def enhance(
    backbone: str | nn.Module,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | tuple[int, int],
    stages: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> FPD:
    """Wrap a CNN in a Feature Pyramid Decoder.

    Args:
        backbone: a timm model name, `resnet_mini`, your own module (a copy of it is taken), or the name of what gives
            it, `package.module:factory`.
        num_classes: number of classes K, at least 2.
        in_channels: channels of an image, 1 or 3.
        image_size: height and width in pixels, or one int for a square; it decides the stem and the
            decoder. Most backbones take other sizes too; those that do not say so when they meet one.
        stages: names of the modules where stages end, stem first. Required for a module that is no ResNet and has no
            `feature_info` as timm's have.
        seed: seed of the new layers' weights; the global random state is left alone.
        options: fields of `robustfpd.ModelConfig` (`head="spectral"`, `denoise="softmax"`, `pretrained=True`, …).

    Returns:
        An `FPD` on the CPU, in training mode; parts of your own module that are in evaluation mode while the
        module itself is in training mode count as frozen and stay so.

    Raises:
        InputError: an unknown name or option, images that the backbone cannot take, or a network whose
            denoising overflows.
    """
    task = parse(TaskConfig, {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size})
    named = backbone if isinstance(backbone, str) else CUSTOM_BACKBONE
    values = {**options, "backbone": named, "stages": None if stages is None else tuple(stages)}
    config = parse(ModelConfig, values)
    if config.defence != "fpd":
        raise InputError("enhance builds FPD models; for the undefended baseline use robustfpd.build(task, config)")
    model = build(task, config, net=None if isinstance(backbone, str) else backbone, seed=seed)
    assert isinstance(model, FPD)
    return model


def build(task: TaskConfig, config: ModelConfig, *, net: nn.Module | None = None, seed: int = 0) -> FPD | Baseline:
    """Build the model that `config` describes.

    Args:
        task: classes, channels and image size.
        config: backbone and defence.
        net: the module, when `config.backbone` is `custom`.
        seed: seed of new weights.

    Raises:
        InputError: as `enhance` does.
    """
    model = assemble(task, config, net, seed)
    _check_finite(model)
    return model


def assemble(
    task: TaskConfig, config: ModelConfig, net: nn.Module | None = None, seed: int = 0, here: bool = True
) -> FPD | Baseline:
    """Build as `build` does, without looking at what comes out.

    It imports and calls a backbone `package.module:factory`, from the folder one is in only with `here`.
    """
    named = net is None and is_foreign(config.backbone)
    if config.pretrained and (named or net is not None):
        raise InputError("pretrained=True loads timm's weights; your own module brings its own: leave pretrained out")
    if (config.backbone == CUSTOM_BACKBONE) != (net is not None):
        hint = "needs the module itself: pass net=" if net is None else "comes from timm: leave out net"
        raise InputError(f"backbone {config.backbone!r} {hint}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "weights"))  # torch.manual_seed would reseed GPUs too
        if named:
            net = foreign(config.backbone, "model.backbone", here)
        if net is not None:
            network = from_module(net, config.stages)
        else:
            network = from_timm(config.backbone, task.in_channels, pretrained=config.pretrained, stages=config.stages)
        kind = FPD if config.defence == "fpd" else Baseline
        model = kind(network, task, config)
    # The layout that convolution kernels prefer, on CPUs and GPUs alike; shapes and results are the same.
    model.to(memory_format=torch.channels_last)
    return model


def _check_finite(model: FPD | Baseline) -> None:
    """Refuse a network whose logits are NaN from the start: dot-product denoising is cubic and can overflow.

    In evaluation mode untrained batch norms do not normalise, so an overflow there is looked at in training mode.
    """
    images = torch.rand(2, model.task.in_channels, *model.task.image_size, generator=generator(0, "overflow"))
    with torch.no_grad(), evaluating(model):
        if bool(model.classifier()(images).isfinite().all()):
            return
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if bool(copy.deepcopy(model).train().classifier()(images).isfinite().all()):
            warnings.warn(
                f"backbone {model.config.backbone!r} gives NaN or infinite logits in evaluation mode until its batch "
                "norms have seen training images; train it first, or use denoise='softmax'",
                stacklevel=3,
            )
            return
    size = "×".join(map(str, model.task.image_size))
    raise InputError(
        f"backbone {model.config.backbone!r} gives NaN or infinite logits for random images of {size} pixels with "
        f"denoise={model.config.denoise!r}; use denoise='softmax' or denoise='gaussian', which do not amplify"
    )


def saved_in(folder: str | Path) -> Path:
    """Where the model lies that `load` takes: a run's best checkpoint, or the folder itself."""
    path = locate(folder)
    best = whole(path / "checkpoints" / "best")
    return best if best.is_dir() else path


def load(folder: str | Path, *, net: nn.Module | None = None, trust_code: bool = False) -> FPD | Baseline:
    """Load a saved model, in evaluation mode, on the CPU. It runs no code that the folder names, unless told to.

    Args:
        folder: what `model.save` wrote, or a run's folder (its best checkpoint is taken). Where there is no such
            folder, the name of a network that comes with robustfpd: `mnist/mini-fpd`; it is fetched where needed.
        net: for a model around your own module, a module of the same architecture; its weights do not matter.
        trust_code: import and call what a backbone `package.module:factory` names, only for models of your own;
            torchvision's networks (`torchvision.models:resnet18`) need no trust.

    Raises:
        InputError: no model there, damaged files, weights that do not fit the architecture, or a network made by code
            that was not trusted.
    """
    path = saved_in(folder)
    task, config = read_settings(path)
    if net is None and not trust_code:
        check_trusted(config.backbone, path)
    if config.backbone == CUSTOM_BACKBONE and net is None:
        raise InputError(f"the model in {path} is built around your own module: pass one like it as net=")
    weights = read_weights(path)
    # The saved weights follow; asking timm for pretrained ones would need the network.
    fixed: dict[str, Any] = {"pretrained": False, "mean": config.mean or (0.0,), "std": config.std or (1.0,)}
    if net is not None and is_foreign(config.backbone):
        fixed["backbone"] = CUSTOM_BACKBONE
    model = assemble(task, config.model_copy(update=fixed), net, here=trust_code)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).split("\n")[1:3])
        raise InputError(f"the weights in {path} do not fit backbone {config.backbone!r}: {reason}") from None
    model.config = config
    return model.eval()
