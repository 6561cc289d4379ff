"""Backbones: timm's by name, our own, and any `nn.Module`, each with the names of the modules where stages end."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from robustfpd.errors import InputError, unknown_name
from robustfpd.models.small_networks import CONV_STAGES, ConvMini, resnet_mini

OWN = ("resnet_mini", "conv_mini", "published_resnet_3_4_23_3", "published_resnext_3_4_6_3")
"""Backbones beside timm's. The numbers are the blocks of each stage; others work too. A number after `mini` is the
width, as in `resnet_mini_32`."""
RESNET_STAGES = ("maxpool", "layer1", "layer2", "layer3", "layer4")
RESNEXT_STAGES = ("conv1", "conv2", "conv3", "conv4", "conv5")

Layout = Literal["NCHW", "NHWC"]


@dataclass(frozen=True)
class BackboneSpec:
    """A network and where its stages end.

    Raises:
        InputError: `stages` names no module, an unknown one, or one twice.
    """

    module: nn.Module
    stages: tuple[str, ...]
    """Names of submodules, stem first."""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Layout = "NCHW"
    """Axes of the maps between the stages."""
    new: bool = False
    """It was created by name and has random weights."""

    def __post_init__(self) -> None:
        names = [name for name, _ in self.module.named_modules() if name]
        if not self.stages:
            raise InputError("stages must name at least one module of the network, found none")
        for name in self.stages:
            if name not in names:
                raise unknown_name("stage", name, names)
        if len(set(self.stages)) != len(self.stages):
            raise InputError(f"stages must differ, found {list(self.stages)}")


def from_timm(
    name: str, in_channels: int, *, pretrained: bool = False, stages: tuple[str, ...] | None = None,
    num_classes: int = 0,
) -> BackboneSpec:  # fmt: skip
    """Create a timm network, or one of `OWN`.

    timm adapts pretrained first layers to `in_channels`. Without `num_classes` the network has no classifier. `stages`
    are module names that override its `feature_info`.

    Raises:
        InputError: timm has no such model, or it lists no stages (it is not a convolutional family).
    """
    own = _own(name, in_channels, num_classes)
    if own is not None:
        if pretrained:
            raise InputError(f"backbone {name!r} has no pretrained weights; leave pretrained out")
        module, ends = own
        return BackboneSpec(module, ends if stages is None else stages, new=True)
    if not timm.is_model(name):
        raise unknown_name("backbone", name, [*OWN, *timm.list_models()])
    try:
        module = timm.create_model(name, pretrained=pretrained, in_chans=in_channels, num_classes=num_classes)
    except (TypeError, RuntimeError, OSError) as error:  # fixed inputs, unknown tags, weights that cannot be fetched
        reason = str(error).strip().split("\n")[0][:200]
        raise InputError(f"backbone {name!r} cannot be built for {in_channels} channels: {reason}") from error
    if stages is None:
        stages = _timm_stages(module, name)
    cfg: dict[str, Any] = dict(module.pretrained_cfg) if pretrained else {}  # type: ignore[arg-type]
    mean, std = tuple(cfg.get("mean", (0.0,))), tuple(cfg.get("std", (1.0,)))
    return BackboneSpec(module, stages, mean, std, getattr(module, "output_fmt", "NCHW"), new=not pretrained)


def from_module(net: nn.Module, stages: tuple[str, ...] | None) -> BackboneSpec:
    """Copy a user's module, to float32 on the CPU.

    A module that is in evaluation mode as a whole comes from an inference script: its copy is put in training mode.
    Parts in evaluation mode inside a module in training mode are frozen on purpose and stay so. `stages` may be None
    for a ResNet or a timm network.
    """
    if stages is None:
        stages = _timm_stages(net) if hasattr(net, "feature_info") else _resnet_stages(net)
    own = copy.deepcopy(net).to("cpu", torch.float32)
    if not own.training:
        own.train()
    return BackboneSpec(own, stages, layout=getattr(own, "output_fmt", "NCHW"))


def _own(name: str, in_channels: int, num_classes: int) -> tuple[nn.Module, tuple[str, ...]] | None:
    """Return a backbone of our own and where its stages end; None when `name` is not one."""
    mini = re.fullmatch(r"(resnet_mini|conv_mini)(?:_([1-9]\d{0,3}))?", name, re.ASCII)
    if mini is not None:
        width = {} if mini[2] is None else {"width": int(mini[2])}
        if mini[1] == "conv_mini":
            return ConvMini(in_channels, num_classes, **width), CONV_STAGES
        resnet = resnet_mini(in_channels, num_classes, **width)
        return resnet, _timm_stages(resnet)
    published = re.fullmatch(r"published_(resnet|resnext)((?:_[1-9]\d{0,2}){4})", name, re.ASCII)
    if published is None:
        return None
    blocks = tuple(map(int, published[2].split("_")[1:]))
    if published[1] == "resnext":
        return PublishedResNeXt(blocks, in_channels), RESNEXT_STAGES
    net = ResNet(Bottleneck, blocks, num_classes=num_classes, in_chans=in_channels)  # type: ignore[arg-type]
    return net, RESNET_STAGES  # the published stem includes the pool


def _resnet_stages(net: nn.Module) -> tuple[str, ...]:
    """Return where the stages of a ResNet end, by torchvision's names, which most others use too."""
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
    stages = tuple(entry["module"] for entry in map(dict, info) if entry.get("module") in known)
    if not stages:
        raise InputError(
            f"backbone {name!r} lists no stages that features_only could return; choose a convolutional timm family, "
            "or pass stages=[module names where stages end]"
        )
    return stages


class PublishedResNeXt(nn.Module):
    """The published ResNeXt: 32×4d after Xie et al., CVPR 2017, with a 3×3 stem of stride 1.

    Its first 1×1 convolutions are grouped too; torchvision's and timm's ResNeXt group the 3×3 convolutions alone.

    Args:
        blocks: number of blocks of the stages `conv2` to `conv5`, of strides 1, 2, 2, 2.
        in_channels: channels of an image.
    """

    def __init__(self, blocks: Sequence[int], in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, 64, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        )
        self.conv2 = _stage(64, 64, blocks[0], stride=1)
        self.conv3 = _stage(256, 128, blocks[1], stride=2)
        self.conv4 = _stage(512, 256, blocks[2], stride=2)
        self.conv5 = _stage(1024, 512, blocks[3], stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map images N×C×H×W to features N×2048×H/8×W/8."""
        x = self.conv1(x)
        out: Tensor = self.conv5(self.conv4(self.conv3(self.conv2(x))))
        return out


class _Block(nn.Module):
    """Grouped 1×1, grouped 3×3 and dense 1×1 convolutions beside a shortcut; 32 groups."""

    def __init__(self, before: int, inner: int, after: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(before, inner, kernel_size=1, groups=32, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, kernel_size=3, stride=stride, padding=1, groups=32, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, after, kernel_size=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(after)
            )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.residual(x) + self.shortcut(x))
        return out


def _stage(before: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """Return blocks of one width, that of a ResNet: 4·width channels at the end. The first block has the stride."""
    inner = 2 * width  # 32 groups of 4 channels for width 64
    first = _Block(before, inner, 4 * width, stride)
    return nn.Sequential(first, *(_Block(4 * width, inner, 4 * width, 1) for _ in range(blocks - 1)))


def channel_constants(values: tuple[float, ...], channels: int, name: str) -> Tensor:
    """Return per-channel constants as 1×C×1×1; one value is for all channels, RGB values are averaged for grey."""
    if channels == 1 and len(values) == 3:
        values = (sum(values) / 3,)
    if len(values) not in (1, channels):
        raise InputError(f"{name} must have 1 or {channels} values, one a channel, found {len(values)}")
    if name == "std" and min(values) <= 0:
        raise InputError(f"std must be positive, found {values}")
    return torch.tensor(values if len(values) == channels else values * channels).reshape(1, channels, 1, 1)


def undo_downsampling(net: nn.Module, ran: Sequence[nn.Module]) -> None:
    """Give strided leaf modules stride 1: convolutions keep their weights, pooling goes."""
    strided = [m for m in ran if not list(m.children()) and _stride(m) > 1]
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if module not in strided:
            continue
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if not isinstance(module.padding, str):
                full = tuple(d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
                if tuple(2 * p for p in module.padding) != full:
                    module.padding = "same"
        elif not list(module.parameters()):
            net.set_submodule(name, nn.Identity())


def prune(parent: nn.Module, needed: set[int]) -> None:
    """Replace by identities the submodules with parameters of which nothing has its `id` in `needed`."""
    for name, child in parent.named_children():
        if any(id(part) in needed for part in (*child.modules(), *child.parameters())):
            prune(child, needed)
        elif any(True for _ in child.parameters()):
            setattr(parent, name, nn.Identity())


def stage_map(output: Any, stage: str, layout: Layout) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return a stage's output as one map N×C×H×W, and a function from such a map to the module's form of output.

    Dual-path networks pass (residual, dense) pairs of one size between stages: channels of one map.
    """
    if isinstance(output, Tensor) and layout == "NHWC" and output.ndim == 4:
        return output.permute(0, 3, 1, 2), lambda feature: feature.permute(0, 2, 3, 1)
    if isinstance(output, Tensor):
        return output, lambda feature: feature
    maps = output if isinstance(output, (tuple, list)) else ()
    if all(isinstance(m, Tensor) and m.ndim == 4 for m in maps) and len({m.shape[-2:] for m in maps}) == 1:
        sizes = [m.shape[1] for m in maps]
        return torch.cat(list(maps), dim=1), lambda feature: type(output)(feature.split(sizes, dim=1))
    raise InputError(f"stage {stage!r} must return a map N×C×H×W, found {_describe(output)}")


def _describe(output: Any) -> str:
    if isinstance(output, (tuple, list)):
        return f"{type(output).__name__} of {', '.join(map(_describe, output))}"
    return f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__


def _stride(module: nn.Module) -> int:
    stride = getattr(module, "stride", 1)
    return max(stride) if isinstance(stride, (tuple, list)) else stride if isinstance(stride, int) else 1
