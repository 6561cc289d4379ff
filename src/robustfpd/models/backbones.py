"""Where backbones come from: timm by name, a few of our own beside it, or the user's own module."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from robustfpd.errors import InputError, unknown_name
from robustfpd.models.resnext import ResNeXt

MINI = "resnet_mini"
OWN = (MINI, "published_resnet_3_4_23_3", "published_resnext_3_4_6_3")
"""Backbones beside timm's. The numbers are blocks a stage, and others go as well."""
RESNET_STAGES = ("maxpool", "layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class Network:
    """A network and where its stages end."""

    module: nn.Module
    stages: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    """Axes of the maps between the stages."""


def from_timm(
    name: str, in_channels: int, *, pretrained: bool = False, stages: tuple[str, ...] | None = None
) -> Network:
    """Create a timm network and ask it where its stages end.

    Args:
        name: a timm model name, with or without a pretrained tag, `resnet_mini`, or a published network by its
            blocks a stage, as in `published_resnet_3_4_23_3` and `published_resnext_3_4_6_3`.
        in_channels: channels of an image; timm adapts pretrained first layers.
        pretrained: load timm's weights (network or cache needed).
        stages: module names that override timm's `feature_info`.

    Raises:
        InputError: timm has no such model, or it lists no stages (it is not a convolutional family).
    """
    own = _own(name, in_channels)
    if own is not None:
        if pretrained:
            raise InputError(f"backbone {name!r} has no pretrained weights; leave pretrained out")
        net, ends = own
        return Network(net, ends if stages is None else stages, (0.0,), (1.0,))
    if not timm.is_model(name):
        raise unknown_name("backbone", name, [*OWN, *timm.list_models()])
    try:
        module = timm.create_model(name, pretrained=pretrained, in_chans=in_channels, num_classes=0)
    except (TypeError, RuntimeError, OSError) as error:  # hard-wired inputs, unknown tags, weights out of reach
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(f"backbone {name!r} cannot be built for {in_channels} channels: {reason}") from error
    cfg: dict[str, Any] = dict(module.pretrained_cfg) if pretrained else {}  # type: ignore[arg-type]
    return Network(
        module,
        _timm_stages(module, name) if stages is None else stages,
        tuple(cfg.get("mean", (0.0,))),
        tuple(cfg.get("std", (1.0,))),
        getattr(module, "output_fmt", "NCHW"),
    )


def from_module(net: nn.Module, stages: tuple[str, ...] | None) -> Network:
    """Take a copy of the user's own module, in float32 on the CPU; his stays as it is.

    A module that is in evaluation mode as a whole comes from an inference script: it is put in training mode.
    Parts in evaluation mode inside a module in training mode are frozen on purpose and stay so.
    """
    if stages is None:
        stages = _timm_stages(net) if hasattr(net, "feature_info") else _resnet_stages(net)
    own = copy.deepcopy(net).to("cpu", torch.float32)
    if not own.training:
        own.train()
    return Network(own, stages, (0.0,), (1.0,))


def resnet_mini(in_channels: int) -> nn.Module:
    """timm's ResNet for CPUs: 16 channels wide in the first stage, one basic block a stage."""
    return ResNet(BasicBlock, (1, 1, 1, 1),  # type: ignore[arg-type]
                  num_classes=0, in_chans=in_channels, stem_type="deep", stem_width=8,
                 channels=(16, 32, 64, 128))  # fmt: skip


def _own(name: str, in_channels: int) -> tuple[nn.Module, tuple[str, ...]] | None:
    """A backbone of our own and where its stages end; None when `name` is not one."""
    if name == MINI:
        mini = resnet_mini(in_channels)
        return mini, _timm_stages(mini)
    published = re.fullmatch(r"published_(resnet|resnext)((?:_[1-9]\d{0,2}){4})", name, re.ASCII)
    if published is None:
        return None
    blocks = tuple(map(int, published[2].split("_")[1:]))
    if published[1] == "resnext":
        return ResNeXt(blocks, in_channels), ("conv1", "conv2", "conv3", "conv4", "conv5")
    net = ResNet(Bottleneck, blocks, num_classes=0, in_chans=in_channels)  # type: ignore[arg-type]
    return net, RESNET_STAGES  # the published stem includes the pool


def _resnet_stages(net: nn.Module) -> tuple[str, ...]:
    """Where the stages of a ResNet end, under the names that torchvision gave them and most others took over."""
    if not all(isinstance(getattr(net, name, None), nn.Module) for name in RESNET_STAGES):
        parts = ", ".join(name for name, _ in net.named_children())
        raise InputError(
            f"stages must name the modules of {type(net).__name__} where its stages end, stem first, and found None; "
            f"on the command line model.stages=[first,second,third]. Its parts are {parts}"
        )
    return RESNET_STAGES


def _timm_stages(module: nn.Module, name: str = "the network") -> tuple[str, ...]:
    info: Any = getattr(module, "feature_info", None) or []
    known = {n for n, _ in module.named_modules() if n}
    entries = [dict(entry) for entry in info]
    stages = tuple(e["module"] for e in entries if e.get("module") in known)
    if not stages:
        raise InputError(
            f"backbone {name!r} tells no stages that features_only could serve; choose a convolutional timm family, "
            "or pass stages=[module names where stages end]"
        )
    return stages


def normalisation(values: tuple[float, ...], channels: int, name: str) -> torch.Tensor:
    """Per-channel constants as 1×C×1×1; one value serves all channels, RGB constants are averaged for grey."""
    if channels == 1 and len(values) == 3:
        values = (sum(values) / 3,)
    if len(values) not in (1, channels):
        raise InputError(f"{name} must have 1 or {channels} values, one a channel, found {len(values)}")
    if name == "std" and min(values) <= 0:
        raise InputError(f"std must be positive, found {values}")
    return torch.tensor(values if len(values) == channels else values * channels).reshape(1, channels, 1, 1)
