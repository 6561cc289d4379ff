"""Build models: `enhance` defends a backbone, `build` follows settings, `load` reads a saved model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustfpd.config import CUSTOM_BACKBONE, ModelConfig, TaskConfig, parse, protocol_defaults
from robustfpd.device import evaluating
from robustfpd.errors import InputError
from robustfpd.io import readable_folder
from robustfpd.models.backbones import from_module, from_timm
from robustfpd.models.checkpoint import read_settings, read_weights
from robustfpd.models.fpd import FPD, Baseline
from robustfpd.models.import_model import check_trusted, import_model, is_import_path
from robustfpd.models.zoo import locate
from robustfpd.rng import derive, generator


def enhance(
    backbone: str | nn.Module,
    *,
    num_classes: int,
    in_channels: int = 3,
    image_size: int | tuple[int, int],
    stages: Sequence[str] | None = None,
    protocol: str = "improved",
    seed: int = 0,
    **options: Any,
) -> FPD:
    """Wrap a CNN in a Feature Pyramid Decoder.

    Args:
        backbone: a timm model name, `resnet_mini`, your own module (it is copied), or the import path of a function
            that returns one, `package.module:factory`.
        num_classes: number of classes K, at least 2.
        in_channels: channels of an image, 1 or 3.
        image_size: height and width in pixels, or one int for a square; it decides the stem and the decoder. Most
            backbones accept other sizes too; the others raise an error for them.
        stages: names of the modules where stages end, stem first. Required for a module that is no ResNet and has no
            `feature_info` as timm's have.
        protocol: `improved`, whose model initially computes the same function as the backbone; or `corrected`, the
            paper's network. It decides the defaults of `options`.
        seed: seed of the new layers' weights; the global random state does not change.
        options: fields of `robustfpd.ModelConfig` (`head="spectral"`, `denoise="softmax"`, `pretrained=True`, …).

    Returns:
        An `FPD` on the CPU, in training mode; parts of your own module that are in evaluation mode while the
        module itself is in training mode count as frozen and stay so.

    Raises:
        InputError: an unknown name or option, images that the backbone cannot take, or a network whose
            denoising overflows.
    """
    if protocol == "published":
        raise InputError(
            "protocol published differs from corrected in fields of its recipes only: use "
            'robustfpd.recipe(name, protocol="published"), or enhance with corrected'
        )
    task = parse(TaskConfig, {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size})
    name = backbone if isinstance(backbone, str) else CUSTOM_BACKBONE
    defaults = protocol_defaults(protocol, "model")
    values = {**defaults, **options, "backbone": name, "stages": None if stages is None else tuple(stages)}
    config = parse(ModelConfig, values)
    if config.defence != "fpd":
        raise InputError("enhance builds FPD models; for the undefended baseline use robustfpd.build(task, config)")
    model = build(task, config, net=None if isinstance(backbone, str) else backbone, seed=seed)
    assert isinstance(model, FPD)
    return model


def build(task: TaskConfig, config: ModelConfig, *, net: nn.Module | None = None, seed: int = 0) -> FPD | Baseline:
    """Build the model that `config` describes, on the CPU, in training mode.

    Args:
        task: classes, channels and image size.
        config: backbone and defence.
        net: the module, when `config.backbone` is `custom`.
        seed: seed of new weights.

    Raises:
        InputError: as for `enhance`.
    """
    model = assemble(task, config, net, seed)
    # Dot-product denoising is cubic and can overflow: NaN or infinite logits of an untrained network are refused.
    images = torch.rand(2, model.task.in_channels, *model.task.image_size, generator=generator(0, "overflow"))
    with torch.no_grad(), evaluating(model):
        if bool(model.classifier()(images).isfinite().all()):
            return model
    # Untrained batch norms do not normalise in evaluation mode, so an overflow there is checked again in training mode.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        if bool(copy.deepcopy(model).train().classifier()(images).isfinite().all()):
            warnings.warn(
                f"backbone {model.config.backbone!r} gives NaN or infinite logits in evaluation mode until its batch "
                "norms have seen training images; train it first",
                stacklevel=2,
            )
            return model
    size, denoise = "×".join(map(str, model.task.image_size)), model.config.denoise
    cubic = model.config.defence == "fpd" and denoise in ("dot", "bottleneck")
    advice = f"denoise={denoise!r} can overflow, use denoise='softmax'" if cubic else "check the network's weights"
    raise InputError(
        f"backbone {model.config.backbone!r} gives NaN or infinite logits for random images of {size} pixels; {advice}"
    )


def assemble(
    task: TaskConfig, config: ModelConfig, net: nn.Module | None = None, seed: int = 0, *, from_cwd: bool = True
) -> FPD | Baseline:
    """Build as `build` does, without checking the logits.

    A backbone `package.module:factory` is imported and called; `from_cwd` looks for it in the working folder too.
    """
    imported = net is None and is_import_path(config.backbone)
    if config.pretrained and (imported or net is not None):
        raise InputError("pretrained=True loads timm's weights; your own module brings its own: leave pretrained out")
    if (config.backbone == CUSTOM_BACKBONE) != (net is not None):
        hint = "needs the module itself: pass net=" if net is None else "comes from timm: leave out net"
        raise InputError(f"backbone {config.backbone!r} {hint}")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive(seed, "weights"))  # torch.manual_seed would reseed GPUs too
        if imported:
            net = import_model(config.backbone, "model.backbone", from_cwd=from_cwd)
        if net is not None:
            spec = from_module(net, config.stages)
        else:
            classes = task.num_classes if config.tail == "own" else 0
            spec = from_timm(
                config.backbone, task.in_channels, pretrained=config.pretrained, stages=config.stages,
                num_classes=classes,
            )  # fmt: skip
        kind = FPD if config.defence == "fpd" else Baseline
        model = kind(spec, task, config)
    model.to(memory_format=model.memory_format)
    if net is not None:  # code that flattens maps by `view` takes contiguous ones only
        try:
            with torch.no_grad(), evaluating(model):
                model.classifier()(torch.zeros(1, task.in_channels, *task.image_size))
        except RuntimeError:
            model.memory_format = torch.contiguous_format
            model.to(memory_format=model.memory_format)
    return model


def saved_in(folder: str | Path) -> Path:
    """Return the folder of the model that `load` reads: a run's best checkpoint, or the folder itself."""
    path = locate(folder)
    best = readable_folder(path / "checkpoints" / "best")
    return best if best.is_dir() else path


def load(folder: str | Path, *, net: nn.Module | None = None, trust_code: bool = False) -> FPD | Baseline:
    """Load a saved model in evaluation mode on the CPU. Code that the folder names is executed only with `trust_code`.

    Args:
        folder: a folder written by `model.save`, or a run's folder (its best checkpoint is loaded). Where there is no
            such folder, the name of a model of the zoo, as in `mnist/mini-fpd`; it is downloaded where needed.
        net: for a model around your own module, a module of the same architecture; its weights do not matter.
        trust_code: import and call a backbone `package.module:factory`; only for models that you trust. torchvision's
            networks (`torchvision.models:resnet18`) need no trust.

    Raises:
        InputError: no model there, damaged files, weights that do not fit the architecture, or a backbone whose code
            is not trusted.
    """
    path = saved_in(folder)
    task, config = read_settings(path)
    if net is None and not trust_code:
        check_trusted(config.backbone, path)
    if config.backbone == CUSTOM_BACKBONE and net is None:
        raise InputError(f"the model in {path} is built around your own module: pass one like it as net=")
    weights = read_weights(path)
    # The saved weights follow, so that timm's pretrained ones need not be downloaded.
    changes: dict[str, Any] = {"pretrained": False, "mean": config.mean or (0.0,), "std": config.std or (1.0,)}
    if config.pretrained and config.small_stem == "new":
        changes["small_stem"] = False  # as it was built: with weights of its own
    if net is not None and is_import_path(config.backbone):
        changes["backbone"] = CUSTOM_BACKBONE
    model = assemble(task, config.model_copy(update=changes), net, from_cwd=trust_code)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).split("\n")[1:3])
        raise InputError(f"the weights in {path} do not fit backbone {config.backbone!r}: {reason}") from None
    model.config = config
    return model.eval()
