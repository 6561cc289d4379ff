from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustfpd.attacks import pgd
from robustfpd.attacks.bpda import BPDA, non_differentiable_modules, straight_through


class _Map(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.function(x)
        return out


def _linear(seed: int = 0) -> nn.Linear:
    layer = nn.Linear(16, 16)
    draws = torch.Generator().manual_seed(seed)
    layer.weight = nn.Parameter(torch.randn(16, 16, generator=draws))
    layer.bias = nn.Parameter(torch.zeros(16))
    return layer


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(1))


BLOCKING = {
    "rounding": lambda x: (8 * x).round() / 8,
    "floor": lambda x: (8 * x).floor() / 8,
    "sign": lambda x: (x - 0.5).sign(),
    "threshold": lambda x: (x > 0.5).float(),
    "detached": lambda x: x.detach() * 2,
    "through numpy": lambda x: torch.from_numpy(x.detach().numpy().copy()),
    "argmax": lambda x: nn.functional.one_hot(x.flatten(1).argmax(1), 16).float().reshape(x.shape),
}


@pytest.mark.parametrize("kind", BLOCKING)
@pytest.mark.parametrize("where", ["first", "inside"])
def test_blocking_modules_are_found(images: Tensor, kind: str, where: str) -> None:
    blocking = _Map(BLOCKING[kind])
    if where == "first":
        net = nn.Sequential(blocking, nn.Flatten(), _linear())
    else:
        net = nn.Sequential(nn.Flatten(), _linear(), nn.Sigmoid(), blocking, _linear(1))
    assert non_differentiable_modules(net.eval(), images) == [blocking]


class _Nested(nn.Module):
    """A module whose submodule blocks gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(_Map(BLOCKING["rounding"]), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def test_the_outermost_of_nested_blocking_modules_is_returned(images: Tensor) -> None:
    nested, other = _Nested(), _Map(BLOCKING["sign"])
    net = nn.Sequential(nested, nn.Flatten(), _linear(), other, _linear(1)).eval()
    assert non_differentiable_modules(net, images) == [nested, other]


@pytest.mark.parametrize(
    "differentiable",
    [
        nn.ReLU(inplace=True),
        nn.ReLU(),
        nn.Hardtanh(0.4, 0.6),
        nn.BatchNorm2d(1),
        nn.GroupNorm(1, 1),
        nn.LayerNorm(4),
        nn.Dropout(0.5),
        nn.Dropout(0.5, inplace=True),
        nn.MaxPool2d(3, stride=1, padding=1),
        nn.AvgPool2d(3, stride=1, padding=1),
        nn.Conv2d(1, 1, 3, padding=1),
        nn.Softmax(dim=3),
        nn.Softmax2d(),
        nn.Identity(),
        nn.Sigmoid(),
        nn.ELU(inplace=True),
        nn.Upsample(size=(4, 4)),
        _Map(lambda x: x.sort(dim=3).values),
        _Map(lambda x: torch.zeros_like(x)),
        _Map(lambda x: 1e-6 * x),
    ],
    ids=lambda m: type(m).__name__,
)
@pytest.mark.parametrize("training", [False, True])
def test_differentiable_modules_are_not_found(images: Tensor, differentiable: nn.Module, training: bool) -> None:
    net = nn.Sequential(differentiable, nn.Flatten(), _linear()).train(training)
    x = images.clone()
    assert non_differentiable_modules(net, x) == []
    if not getattr(differentiable, "inplace", False):
        assert torch.equal(x, images)


def test_modules_with_other_inputs_or_shapes_are_not_found(images: Tensor) -> None:
    class Unusual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two, self.integer, self.pooled = _Two(), _Integer(), _Map(lambda x: x.detach().mean(dim=3))

        def forward(self, x: Tensor) -> Tensor:
            self.integer(torch.zeros(3, dtype=torch.long))
            self.pooled(x)
            out: Tensor = self.two(x, x).flatten(1)
            return out

    class _Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a + b).detach()

    class _Integer(nn.Module):
        def forward(self, a: Tensor) -> Tensor:
            return a.clone()

    assert non_differentiable_modules(Unusual().eval(), images) == []


def test_the_classifier_does_not_change(images: Tensor) -> None:
    net = nn.Sequential(nn.BatchNorm2d(1), _Map(BLOCKING["sign"]), nn.Flatten(), _linear()).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    non_differentiable_modules(net, images)
    BPDA(net, [net[1]])(images)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not any(m.training for m in net.modules())


def test_hooks_are_removed_after_an_error(images: Tensor) -> None:
    net = nn.Sequential(_Map(BLOCKING["sign"]), nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        BPDA(net, [net[0]])(images)
    with pytest.raises(RuntimeError):
        non_differentiable_modules(net, images)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("kind", ["rounding", "sign", "detached"])
def test_outputs_stay_and_gradients_pass_as_through_the_identity(images: Tensor, kind: str) -> None:
    head = nn.Sequential(nn.Flatten(), _linear(), nn.Linear(16, 3))  # linear: its slope is the same everywhere
    blocking = _Map(BLOCKING[kind])
    net = nn.Sequential(blocking, head).eval()
    view = BPDA(net, [blocking])
    assert torch.equal(view(images), net(images))
    x, z = images.clone().requires_grad_(), images.clone().requires_grad_()
    mixture = torch.tensor([1.0, -2.0, 0.5])
    (gradient,) = torch.autograd.grad((view(x) * mixture).sum(), x)
    (expected,) = torch.autograd.grad((head(z) * mixture).sum(), z)
    assert torch.equal(gradient, expected)
    assert float(expected.abs().max()) > 0


def test_straight_through_returns_the_output_with_the_gradient_of_the_input() -> None:
    x, out = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    passed = straight_through(x, out)
    assert torch.equal(passed, out)
    (3 * passed).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((5,), 3.0))
    assert out.grad is None


def test_an_attack_succeeds_where_the_gradient_is_zero(images: Tensor) -> None:
    blocking = _Map(BLOCKING["rounding"])
    net = nn.Sequential(blocking, nn.Flatten(), _linear(), nn.Linear(16, 3)).eval()
    labels = net(images).argmax(1)
    direct = pgd(net, images, labels, eps=0.5, random_start=False)
    through_view = pgd(BPDA(net, non_differentiable_modules(net, images)), images, labels, eps=0.5, random_start=False)
    assert torch.equal(direct, images)
    assert bool((net(through_view).argmax(1) != labels).all())


def test_submodules_are_not_registered_twice(images: Tensor) -> None:
    net = nn.Sequential(_Map(BLOCKING["sign"]), nn.Flatten(), _linear())
    view = BPDA(net, [net[0]])
    assert len(list(view.parameters())) == 2
    assert list(view.state_dict()) == [f"classifier.{k}" for k in net.state_dict()]
    assert list(view.children()) == [net]
