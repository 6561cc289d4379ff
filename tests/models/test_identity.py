"""A new FPD computes what its network computes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models.test_families import ALL, FAST
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.models.small_networks import resnet_mini
from robustfpd.rng import derive

CLASSES = 7


def assert_identity(model: rf.FPD, net: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        out, expected = model(x), net(x)
    assert float((out.logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert torch.equal(out.restored, x)


def enhance(net: str | nn.Module, size: int, **options: Any) -> rf.FPD:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*until its batch norms have seen training images")
        return rf.enhance(net, image_size=size, **{"num_classes": CLASSES, **options}).eval()


# timm's families


def timm_network(name: str) -> nn.Module:
    """Return timm's network with the weights that `enhance` draws for it."""
    torch.manual_seed(derive(0, "weights"))
    if name == "resnet_mini":
        return resnet_mini(3, CLASSES).eval()
    return timm.create_model(name, num_classes=CLASSES).eval()


def assert_family(name: str) -> None:
    net, x = timm_network(name), torch.rand(2, 3, 64, 64)
    by_module, by_name = enhance(net, 64), enhance(name, 64)
    assert_identity(by_module, net, x)
    assert_identity(by_name, net, x)


@pytest.mark.parametrize("name", FAST)
def test_a_family_starts_as_itself(name: str) -> None:
    assert_family(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_every_family_starts_as_itself(name: str) -> None:
    assert_family(name)


# torchvision's networks

TORCHVISION: dict[str, Sequence[str] | None] = {
    "alexnet": ["features.2", "features.5", "features.12"],
    "vgg11": ["features.2", "features.5", "features.10", "features.20"],
    "vgg11_bn": ["features.3", "features.7", "features.14", "features.28"],
    "densenet121": ["features.relu0", "features.denseblock1", "features.denseblock2", "features.denseblock4"],
    "mobilenet_v2": ["features.1", "features.3", "features.6", "features.13", "features.17"],
    "mobilenet_v3_small": ["features.0", "features.1", "features.3", "features.8", "features.11"],
    "efficientnet_b0": ["features.1", "features.2", "features.3", "features.5", "features.7"],
    "efficientnet_v2_s": ["features.1", "features.2", "features.3", "features.5", "features.6"],
    "shufflenet_v2_x0_5": ["conv1", "stage2", "stage3", "stage4"],
    "squeezenet1_1": ["features.1", "features.4", "features.7", "features.12"],
    "mnasnet0_5": ["layers.7", "layers.8", "layers.9", "layers.11", "layers.13"],
    "regnet_x_400mf": [
        "stem", "trunk_output.block1", "trunk_output.block2", "trunk_output.block3", "trunk_output.block4",
    ],
    "convnext_tiny": ["features.1", "features.3", "features.5", "features.7"],
    "googlenet": ["conv3", "inception3b", "inception4e", "inception5b"],
    "inception_v3": ["Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"],
    "resnet18": None,
    "resnext50_32x4d": None,
    "wide_resnet50_2": None,
}  # fmt: skip
"""Where the networks' stages end. torchvision's ResNets have the names that are known."""


def torchvision_network(name: str) -> nn.Module:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    net: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES, **options)
    return net


def assert_torchvision(name: str) -> None:
    size = 128 if name == "inception_v3" else 96
    net = torchvision_network(name).eval()
    x = torch.rand(2, 3, size, size)
    assert_identity(enhance(net, size, stages=TORCHVISION[name]), net, x)
    other = enhance(net, size, stages=TORCHVISION[name], num_classes=4)
    assert other(x).logits.shape == (2, 4)
    assert torch.equal(other(x).restored, x)
    own, kept = net.state_dict(), other.backbone.net.state_dict()
    assert kept.keys() <= own.keys()
    assert len(own) - len(kept) <= 2  # weight and bias of the last linear layer
    assert all(torch.equal(own[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_a_network_of_torchvision_starts_as_itself(name: str) -> None:
    assert_torchvision(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_every_network_of_torchvision_starts_as_itself(name: str) -> None:
    assert_torchvision(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TORCHVISION if name != "inception_v3"])
def test_every_network_of_torchvision_trains(name: str) -> None:
    """Inception's auxiliary classifier needs larger images in training."""
    net = torchvision_network(name)
    model = enhance(net, 96, stages=TORCHVISION[name]).train()
    out = model(torch.rand(2, 3, 96, 96))
    (out.logits.square().sum() + out.restored.square().sum()).backward()
    auxiliary = ("backbone.net.aux1", "backbone.net.aux2")  # GoogLeNet's, whose outputs are not used
    assert not [n for n, p in model.named_parameters() if p.grad is None and not n.startswith(auxiliary)]


# Random networks


class FunctionalReLU(nn.Module):
    """A ReLU that is no activation module."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "relu in place": lambda: nn.ReLU(inplace=True), "elu in place": lambda: nn.ELU(inplace=True),
    "leaky relu in place": lambda: nn.LeakyReLU(inplace=True), "hardswish in place": lambda: nn.Hardswish(inplace=True),
    "silu": nn.SiLU, "gelu": nn.GELU, "functional relu": FunctionalReLU,
}  # fmt: skip
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d, "group": lambda width: nn.GroupNorm(2, width), "none": lambda width: nn.Identity(),
}  # fmt: skip
CLASSIFIERS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "linear": lambda width, classes: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)],
    "dropout": lambda width, classes: [
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0), nn.Linear(width, classes),
    ],
    "convolution": lambda width, classes: [nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, classes, 1), nn.Flatten()],
    "two linear layers": lambda width, classes: [
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(width, 6), nn.ReLU(inplace=True), nn.Linear(6, classes),
    ],
    "as in SqueezeNet": lambda width, classes: [
        nn.Dropout(0.0), nn.Conv2d(width, classes, 1), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ],
    "none": lambda width, classes: [nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    "none, maps": lambda width, classes: [],
}  # fmt: skip


class Network(nn.Module):
    """Stages of a convolution, a norm and an activation, and a classifier."""

    def __init__(
        self, widths: Sequence[int], strides: Sequence[int], activation: str, norm: str, classifier: str,
        *, in_channels: int, num_classes: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stages = nn.ModuleList()
        before = in_channels
        for width, stride in zip(widths, strides, strict=True):
            convolution = nn.Conv2d(before, width, 3, stride=stride, padding=1)
            self.stages.append(nn.Sequential(convolution, NORMS[norm](width), ACTIVATIONS[activation]()))
            before = width
        self.classifier = nn.Sequential(*CLASSIFIERS[classifier](before, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        out: Tensor = self.classifier(x)
        return out


@st.composite
def networks(draw: st.DrawFn) -> tuple[Network, dict[str, Any]]:
    """A random network in training mode, and options of `enhance` that fit it."""
    depth = draw(st.integers(1, 5))
    size = draw(st.tuples(st.integers(8, 20), st.integers(8, 20)))
    channels, classes = draw(st.sampled_from([1, 3])), draw(st.integers(2, 6))
    torch.manual_seed(draw(st.integers(0, 1000)))
    net = Network(
        draw(st.lists(st.sampled_from([12, 14, 16]), min_size=depth, max_size=depth)),
        draw(st.lists(st.sampled_from([1, 2]), min_size=depth, max_size=depth)),
        draw(st.sampled_from(sorted(ACTIVATIONS))), draw(st.sampled_from(sorted(NORMS))),
        draw(st.sampled_from(sorted(CLASSIFIERS))), in_channels=channels, num_classes=classes,
    )  # fmt: skip
    ends = draw(st.sampled_from(["", ".0", ".1"]))  # the stage, or its convolution or norm, which may be overwritten
    options = {
        "stages": [f"stages.{i}{ends}" for i in range(depth)], "in_channels": channels, "image_size": size,
        "front_stages": draw(st.none() | st.integers(1, depth)), "denoise_after": tuple(range(min(2, depth))),
        "pyramid_channels": draw(st.sampled_from([None, 4])), "middle": draw(st.sampled_from(["input", "restored"])),
        "denoise": draw(st.sampled_from(["normalised", "dot", "softmax", "bottleneck", "none"])),
        "pyramid_reads": draw(st.sampled_from(["denoised", "raw"])), "num_classes": classes,
        "restoration_scale": draw(st.sampled_from([0.1, 1])),
    }  # fmt: skip
    return net, options


def new_layer(net: Network) -> tuple[str, ...]:
    """Names of the weights of a network's last linear layer, where its outputs are the network's."""
    layers = [n for n, m in net.named_modules() if n.startswith("classifier") and isinstance(m, nn.Linear | nn.Conv2d)]
    squeezes = any(isinstance(m, nn.ReLU) for m in net.classifier) and not isinstance(net.classifier[-1], nn.Linear)
    return () if squeezes or not layers else tuple(f"{layers[-1]}.{p}" for p in ("weight", "bias"))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(drawn=networks(), training=st.booleans(), seed=st.integers(0, 1000))
def test_a_random_network_starts_as_itself(drawn: tuple[Network, dict[str, Any]], training: bool, seed: int) -> None:
    net, options = drawn
    draws = torch.Generator().manual_seed(seed)
    x = torch.rand(3, options["in_channels"], *options["image_size"], generator=draws).double()
    model = rf.enhance(net, **options).train(training).double()
    net = copy.deepcopy(net).train(training).double()  # batch norms of few values are sensitive to rounding
    out, expected = model(x), net(x)
    assert torch.equal(out.restored, x)
    if expected.shape == (3, options["num_classes"]):
        assert float((out.logits - expected).detach().abs().max()) <= 1e-5 * float(expected.detach().abs().max())
    else:  # without a classifier a new layer follows the network's pooled features
        features = expected.mean(dim=(2, 3)) if expected.ndim == 4 else expected
        assert torch.allclose(out.logits, model.head(features), rtol=1e-5, atol=1e-7)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(drawn=networks(), more=st.integers(1, 5))
def test_for_other_classes_only_a_random_networks_last_linear_layer_is_new(
    drawn: tuple[Network, dict[str, Any]], more: int
) -> None:
    net, options = drawn
    num_classes = options.pop("num_classes") + more
    model = rf.enhance(net, num_classes=num_classes, **options).eval()
    x = torch.rand(2, options["in_channels"], *options["image_size"])
    out = model(x)
    assert out.logits.shape == (2, num_classes)
    assert torch.equal(out.restored, x)
    own, kept = net.state_dict(), model.backbone.net.state_dict()
    assert set(own) - set(kept) == set(new_layer(net))
    assert all(torch.equal(own[name], tensor) for name, tensor in kept.items())
    linear = model.head.linear
    assert isinstance(linear, nn.Linear)
    assert linear.out_features == num_classes
    before = len(own[new_layer(net)[0]][0]) if new_layer(net) else net.eval()(x).shape[1]
    assert linear.in_features == before
