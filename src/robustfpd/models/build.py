"""`enhance` builds a defended classifier, `load` reads one back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustfpd.config import CUSTOM_BACKBONE, ModelConfig, TaskConfig, parse
from robustfpd.errors import InputError
from robustfpd.models.checkpoint import read_settings, read_weights, recovered
from robustfpd.models.fpd import FPD, Plain
from robustfpd.models.networks import from_module, from_timm
from robustfpd.seeding import derive


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
        backbone: a timm model name, `resnet_mini`, or your own module (a copy of it is taken).
        num_classes: number of classes K, at least 2.
        in_channels: channels of an image, 1 or 3.
        image_size: height and width in pixels, or one int for a square. The model takes other sizes
            too; this one decides the stem and the decoder.
        stages: names of the modules where stages end, stem first. Required for a module without timm's
            `feature_info`.
        seed: seed of the new layers' weights; the global random state is left alone.
        options: fields of `robustfpd.ModelConfig` (`head="spectral"`, `denoise="softmax"`, `pretrained=True`, …).

    Returns:
        An `FPD` on the CPU; new layers are in training mode, those of your own module as they were.

    Raises:
        InputError: an unknown name or option, or images that the backbone cannot take.
    """
    task = parse(TaskConfig, {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size})
    named = backbone if isinstance(backbone, str) else CUSTOM_BACKBONE
    values = {**options, "backbone": named, "stages": None if stages is None else tuple(stages)}
    config = parse(ModelConfig, values)
    if config.defence != "fpd":
        raise InputError("enhance builds FPD models; for the plain twin use robustfpd.build(task, config)")
    model = build(task, config, net=None if isinstance(backbone, str) else backbone, seed=seed)
    assert isinstance(model, FPD)
    return model


def build(task: TaskConfig, config: ModelConfig, *, net: nn.Module | None = None, seed: int = 0) -> FPD | Plain:
    """Build the model that `config` describes.

    Args:
        task: classes, channels and image size.
        config: backbone and defence.
        net: the module, when `config.backbone` is `custom`.
        seed: seed of new weights.
    """
    if net is not None and config.pretrained:
        raise InputError("pretrained=True loads timm's weights; your own module brings its own: leave pretrained out")
    if (config.backbone == CUSTOM_BACKBONE) != (net is not None):
        hint = "needs the module itself: pass net=" if net is None else "comes from timm: leave out net"
        raise InputError(f"backbone {config.backbone!r} {hint}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "weights"))  # torch.manual_seed would reseed GPUs too
        if net is not None:
            network = from_module(net, config.stages)
        else:
            network = from_timm(config.backbone, task.in_channels, pretrained=config.pretrained, stages=config.stages)
        kind = FPD if config.defence == "fpd" else Plain
        model = kind(network, task, config)
    # The layout that convolution kernels prefer, on CPUs and GPUs alike; shapes and results are the same.
    model.to(memory_format=torch.channels_last)
    return model


def load(folder: str | Path, *, net: nn.Module | None = None) -> FPD | Plain:
    """Load a saved model, in evaluation mode, on the CPU.

    Args:
        folder: what `model.save` wrote, or a run's folder (its best checkpoint is taken).
        net: for a model around your own module, a module of the same architecture; its weights do not matter.

    Raises:
        InputError: no model there, damaged files, or weights that do not fit the architecture.
    """
    path = Path(folder)
    best = recovered(path / "checkpoints" / "best")
    path = best if best.is_dir() else path
    task, config = read_settings(path)
    if config.backbone == CUSTOM_BACKBONE and net is None:
        raise InputError(f"the model in {path} is built around your own module: pass one like it as net=")
    weights = read_weights(path)
    # The saved weights follow; asking timm for pretrained ones would need the network.
    fixed = {"pretrained": False, "mean": config.mean or (0.0,), "std": config.std or (1.0,)}
    model = build(task, config.model_copy(update=fixed), net=net)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).split("\n")[1:3])
        raise InputError(f"the weights in {path} do not fit backbone {config.backbone!r}: {reason}") from None
    model.config = config
    return model.eval()
