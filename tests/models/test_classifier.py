"""The network's own last linear layer is taken out of it and becomes the head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.fpds import effective_weight
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.errors import InputError
from robustfpd.models.classifier import OwnClassifier, take_classifier


class OwnNet(nn.Module):
    """A stage of maps with four channels, and layers after it."""

    def __init__(self, *tail: nn.Module) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.tail = nn.Sequential(*tail)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tail(self.stage(x))
        return out


def pooled() -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def taken(net: nn.Module, num_classes: int) -> OwnClassifier:
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return take_classifier(net.eval(), net.get_submodule("stage"), lambda: net(image), num_classes)


TAKEN: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: OwnNet(*pooled(), nn.Linear(4, 5)),
    "without bias": lambda: OwnNet(*pooled(), nn.Linear(4, 5, bias=False)),
    "dropout": lambda: OwnNet(*pooled(), nn.Dropout(0.5), nn.Linear(4, 5)),
    "two linear layers": lambda: OwnNet(*pooled(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)),
    "maps of 8×8": lambda: OwnNet(nn.Flatten(), nn.Linear(256, 5)),
    "convolution": lambda: OwnNet(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1), nn.Flatten()),
    "convolution of 8×8": lambda: OwnNet(nn.Conv2d(4, 5, 8), nn.Flatten()),
    "convolution without bias": lambda: OwnNet(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1, bias=False), nn.Flatten()),
}


@pytest.mark.parametrize("case", TAKEN)
@pytest.mark.parametrize("num_classes", [5, 7])
def test_the_last_linear_layer_is_taken_out_of_the_network(case: str, num_classes: int) -> None:
    net, x = TAKEN[case]().eval(), torch.rand(3, 3, 8, 8)
    original = copy.deepcopy(net)
    found = taken(net, num_classes)
    weights = {**net.state_dict(), **({} if found.linear is None else found.linear.state_dict())}
    features = net(x)
    assert features.shape == (3, found.channels)
    assert not found.logits
    if num_classes == 5:
        assert found.linear is not None
        assert torch.allclose(found.linear(features), original(x), atol=1e-6)
        assert len(weights) == len(original.state_dict())
    else:
        assert found.linear is None
    kept = {name: t for name, t in original.state_dict().items() if name in net.state_dict()}
    assert kept.keys() == net.state_dict().keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in net.state_dict().items())


def test_a_linear_layer_that_is_taken_is_the_networks_own_module() -> None:
    net = OwnNet(*pooled(), nn.Linear(4, 5))
    layer = net.tail[-1]
    assert taken(net, 5).linear is layer


class Reads(OwnNet):
    """Reads its classifier's weight beside calling it."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        last = self.tail[-1]
        assert isinstance(last, nn.Linear)
        return out + 0 * last.weight.sum()


def positive(layer: nn.Linear) -> nn.Linear:
    nn.init.constant_(layer.bias, 50.0)
    return layer


KEPT: dict[str, Callable[[], nn.Module]] = {
    "squeezenet": lambda: OwnNet(nn.Conv2d(4, 5, 1), nn.ReLU(), *pooled()),
    "pooling of its outputs": lambda: OwnNet(nn.Conv2d(4, 5, 1), *pooled()),
    "a relu that lets all through": lambda: OwnNet(*pooled(), positive(nn.Linear(4, 5)), nn.ReLU()),
    "a softmax": lambda: OwnNet(*pooled(), nn.Linear(4, 5), nn.Softmax(dim=1)),
    "a clamp": lambda: OwnNet(*pooled(), nn.Linear(4, 5), nn.Hardtanh(-90, 90)),
    "a fixed shape": lambda: OwnNet(*pooled(), nn.Linear(4, 5), nn.Unflatten(1, (5, 1)), nn.Flatten()),
    "its weight is read": lambda: Reads(*pooled(), nn.Linear(4, 5)),
}


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("num_classes", [5, 7])
def test_a_network_whose_last_linear_layer_is_not_its_end_stays_as_it_is(case: str, num_classes: int) -> None:
    net, x = KEPT[case]().eval(), torch.rand(3, 3, 8, 8)
    original = copy.deepcopy(net)
    assert taken(net, num_classes) == OwnClassifier(5, None, logits=num_classes == 5)
    assert repr(net) == repr(original)
    assert torch.equal(net(x), original(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("tail", [pooled(), [nn.AdaptiveAvgPool2d(1)], []])
def test_a_network_without_a_classifier_returns_its_features(tail: list[nn.Module]) -> None:
    net = OwnNet(*tail)
    before = repr(net)
    for num_classes in (4, 5):  # as many features as classes are not logits
        assert taken(net, num_classes) == OwnClassifier(4, None)
    assert repr(net) == before


def test_what_is_taken_does_not_depend_on_the_weights() -> None:
    """A saved model is built from a module whose weights do not matter."""
    for cases, ends in ((TAKEN, True), (KEPT, False)):
        for case, make in cases.items():
            net = make()
            for parameter in net.parameters():
                nn.init.zeros_(parameter)
            assert (taken(net, 5).linear is not None) is ends, case


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_convolution_is_taken_though_its_sums_are_rounded_otherwise(seed: int) -> None:
    torch.manual_seed(seed)
    net = OwnNet(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 512, 1), nn.Conv2d(512, 1000, 1), nn.Flatten())
    assert taken(net, 1000).linear is not None


OWN_OPTIONS: dict[str, Any] = {"stages": ("stage",), "image_size": 8, "denoise_after": (0,)}


def own_head(head: str, **options: Any) -> tuple[nn.Module, rf.FPD]:
    net = OwnNet(*pooled(), nn.Linear(4, 5)).eval()
    return net, rf.enhance(net, num_classes=5, head=head, **OWN_OPTIONS, **options).eval()


def own_weight(net: nn.Module) -> Tensor:
    weight = net.get_submodule("tail.2").weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def test_the_tanh_head_squashes_the_networks_own_logits() -> None:
    net, model = own_head("tanh")
    x = torch.rand(3, 3, 8, 8)
    assert torch.allclose(model(x).logits, net(x).tanh(), atol=1e-6)
    assert torch.allclose(model.classifier(squash=False)(x), net(x), atol=1e-6)


@pytest.mark.parametrize("lipschitz", [0.1, 100.0])
def test_the_spectral_head_bounds_the_networks_own_weights(lipschitz: float) -> None:
    net, model = own_head("spectral", lipschitz=lipschitz)
    x, largest = torch.rand(3, 3, 8, 8), float(torch.linalg.svdvals(own_weight(net))[0])
    expected = own_weight(net) * min(1.0, lipschitz / largest)
    assert torch.allclose(effective_weight(model.head), expected, atol=1e-6)
    if lipschitz > largest:
        assert torch.allclose(model(x).logits, net(x), atol=1e-6)
    else:
        assert float(torch.linalg.svdvals(effective_weight(model.head))[0]) == pytest.approx(lipschitz, rel=1e-4)


@pytest.mark.parametrize("lipschitz", [0.5, 2.0])
def test_the_orthogonal_head_keeps_the_networks_own_rows_and_bias(lipschitz: float) -> None:
    net, model = own_head("orthogonal", lipschitz=lipschitz)
    raw = model.head.linear.parametrizations.weight.original  # type: ignore[union-attr]
    assert isinstance(raw, Tensor)
    assert torch.equal(raw, own_weight(net))
    assert torch.equal(model.head.bias, net.get_submodule("tail.2").bias)  # type: ignore[arg-type]
    weight = effective_weight(model.head)
    values = torch.linalg.svdvals(weight)
    assert torch.allclose(values, torch.full_like(values, lipschitz), rtol=1e-4)
    columns = torch.linalg.lstsq(own_weight(net), weight).solution  # Q spans what the own weight spans
    assert torch.allclose(own_weight(net) @ columns, weight, atol=1e-5)


@pytest.mark.parametrize("head", ["tanh", "spectral", "orthogonal"])
def test_a_bound_on_a_layer_that_others_follow_is_refused(head: str) -> None:
    net = KEPT["squeezenet"]()
    with pytest.raises(InputError, match=rf"head={head} bounds .* other layers follow it .*leave head out, or"):
        rf.enhance(net, num_classes=5, head=head, **OWN_OPTIONS)
    other = rf.enhance(net, num_classes=7, head=head, **OWN_OPTIONS)  # a new layer behind the network's five logits
    assert other(torch.rand(2, 3, 8, 8)).logits.shape == (2, 7)
    pooling = rf.enhance(net, num_classes=5, head=head, tail="pooling", **OWN_OPTIONS)
    assert pooling(torch.rand(2, 3, 8, 8)).logits.shape == (2, 5)
