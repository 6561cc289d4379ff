from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.fpds import as_trained, gated
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.attacks import adaptive, pgd
from robustfpd.attacks.adaptive import JOINT_WEIGHT, LOGITS, PRE_SQUASH, adaptive_views
from robustfpd.attacks.base import preserve_state
from robustfpd.errors import InputError
from robustfpd.models.denoise import Bottleneck, NonLocal

GRADIENT_VIEWS = ["bpda-restoration", "front-pass", "bpda-denoising", "joint", "joint-hidden"]
AROUND = {"improved": "bpda-restoration", "corrected": "back-pass"}
"""The view of the path around the decoder, by protocol."""


PROTOCOLS = pytest.mark.parametrize("protocol", ["improved", "corrected"])


def _new(**options: Any) -> rf.FPD:
    """An FPD whose batch norms have seen images and whose head squashes, gates and restoration as they start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = rf.enhance(
            "resnet_mini", num_classes=3, in_channels=1, image_size=8, mean=(0.4,), std=(0.3,),
            **gated(**{"pyramid_channels": 8, "head": "tanh", **options}),
        )  # fmt: skip
        model.train()(torch.rand(16, 1, 8, 8))
    return model.double().eval()


def _model(**options: Any) -> rf.FPD:
    return as_trained(_new(**options))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(4)).double()


LABELS = torch.tensor([0, 1, 2, 1, 0])


def _gradient(module: nn.Module, images: Tensor) -> Tensor:
    """Return the gradient of a fixed mixture of logits."""
    x = images.clone().requires_grad_()
    logits = module(x)
    mixture = torch.linspace(-1, 2, logits.numel()).double().reshape(logits.shape)
    (gradient,) = torch.autograd.grad((logits * mixture).sum(), x)
    return gradient


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-9, atol=1e-12))


@pytest.mark.parametrize("head", ["tanh", "spectral", "orthogonal", "linear"])
@pytest.mark.parametrize("middle", ["input", "restored", "none"])
@pytest.mark.parametrize("denoise_after", [(), (0, 1)])
@PROTOCOLS
def test_every_view_returns_pre_squash_logits(
    images: Tensor, head: str, middle: str, denoise_after: tuple[int, ...], protocol: str
) -> None:
    model = _model(head=head, middle=middle, denoise_after=denoise_after, protocol=protocol)
    views = adaptive_views(model.classifier(), images)
    expected = [LOGITS, *([PRE_SQUASH] if head == "tanh" else []), "bpda-restoration", "front-pass"]
    expected += ["back-pass"] if middle == "input" and protocol == "corrected" else []
    expected += ["bpda-denoising"] if middle != "none" or denoise_after else []
    assert list(views) == [*expected, "joint", "joint-hidden"]
    with torch.no_grad():
        features = model.back(model.restore(images), images)
        for name, view in views.items():
            expected_logits = model.head(features) if name == LOGITS else model.head.pre_squash(features)
            assert torch.equal(view.module(images), expected_logits)
    assert not any(view.surrogate for view in views.values())
    assert [n for n, v in views.items() if v.loss is not None] == ["joint", "joint-hidden"]


@pytest.mark.parametrize("denoise", ["normalised", "dot", "softmax", "gaussian", "bottleneck", "none"])
@pytest.mark.parametrize("normalise", ["each_pass", "once"])
@PROTOCOLS
def test_every_kind_of_denoising_has_views_with_gradients(
    images: Tensor, denoise: str, normalise: str, protocol: str
) -> None:
    model = _model(denoise=denoise, normalise=normalise, protocol=protocol)
    exact = _gradient(model.classifier(squash=False), images)
    with torch.no_grad():
        before = model.classifier(squash=False)(images)
    for name in GRADIENT_VIEWS:
        view = adaptive_views(model.classifier(), images)[name]
        assert torch.equal(view.module(images), before)
        gradient = _gradient(view.module, images)
        assert bool(gradient.isfinite().all())
        assert bool((gradient != 0).flatten(1).any(1).all())
        assert _close(gradient, exact) == name.startswith("joint")  # their loss differs, their gradient is exact


@pytest.mark.parametrize("middle", ["input", "restored", "none"])
@PROTOCOLS
def test_straight_through_restoration_equals_the_identity(images: Tensor, middle: str, protocol: str) -> None:
    model = _model(middle=middle, protocol=protocol)
    restored = model.restore(images).detach()

    def by_hand(x: Tensor) -> Tensor:
        moved = restored + (x - images)
        return model.head.pre_squash(model.back(moved, x))

    gradient = _gradient(adaptive_views(model.classifier(), images)["bpda-restoration"].module, images)
    expected = _gradient(_Function(by_hand), images)
    assert _close(gradient, expected)
    assert not _close(gradient, _gradient(model.classifier(squash=False), images))


class _Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.function(images)
        return out


@pytest.mark.parametrize("denoise", ["normalised", "dot", "bottleneck", "none"])
@pytest.mark.parametrize(("protocol", "front_stages"), [("improved", 1), ("improved", None), ("corrected", None)])
def test_front_and_back_pass_add_up_to_the_full_gradient(
    images: Tensor, denoise: str, protocol: str, front_stages: int | None
) -> None:
    model = _model(denoise=denoise, protocol=protocol, front_stages=front_stages)
    views = adaptive_views(model.classifier(), images)
    front, back = (_gradient(views[name].module, images) for name in ("front-pass", AROUND[protocol]))
    assert _close(front + back, _gradient(model.classifier(squash=False), images))
    assert bool((front != 0).flatten(1).any(1).all())
    assert float(back.abs().max()) > 0


def test_the_front_pass_has_the_full_gradient_where_the_back_pass_sees_no_input(images: Tensor) -> None:
    model = _model(middle="none", protocol="corrected")
    front = _gradient(adaptive_views(model.classifier(), images)["front-pass"].module, images)
    assert _close(front, _gradient(model.classifier(squash=False), images))


@PROTOCOLS
def test_straight_through_denoising_equals_a_network_without_denoising(images: Tensor, protocol: str) -> None:
    model = _model(denoise="dot", protocol=protocol)
    view = adaptive_views(model.classifier(), images)["bpda-denoising"].module
    gradient = _gradient(view, images)
    layers = [m for m in model.modules() if isinstance(m, (NonLocal, Bottleneck))]
    assert len(layers) == 2
    hooks = [m.register_forward_hook(lambda m, inputs, out: inputs[0] + (out - inputs[0]).detach()) for m in layers]
    constant = images.clone()
    expected = _gradient(
        _Function(lambda x: model.head.pre_squash(model.back(model.restore(x), constant))), images
    )  # fmt: skip
    for hook in hooks:
        hook.remove()
    assert _close(gradient, expected)
    assert not _close(gradient, _gradient(adaptive_views(model.classifier(), images)["front-pass"].module, images))


@pytest.mark.parametrize("middle", ["input", "restored"])
@pytest.mark.parametrize("denoise", ["normalised", "none"])
@PROTOCOLS
def test_no_gradient_flows_through_the_means_past_the_denoising(
    images: Tensor, middle: str, denoise: str, protocol: str
) -> None:
    model = _model(middle=middle, denoise=denoise, protocol=protocol)
    gradient = _gradient(adaptive_views(model.classifier(), images)["bpda-denoising"].module, images)
    assert not _close(gradient, _gradient(model.classifier(squash=False), images))
    restored = model.restore(images)
    means = (model.middle_denoise(restored, images) - restored).detach()
    if denoise == "none":
        expected = _gradient(
            _Function(lambda x: model.head.pre_squash(model._pooled(model.restore(x) + means))), images
        )
        assert _close(gradient, expected)


@pytest.mark.parametrize("middle", ["input", "restored", "none"])
@pytest.mark.parametrize("denoise", ["normalised", "none"])
def test_a_view_of_denoising_exists_where_there_is_some(images: Tensor, middle: str, denoise: str) -> None:
    views = adaptive_views(_new(middle=middle, denoise=denoise).classifier(), images)
    assert ("bpda-denoising" in views) == ((middle, denoise) != ("none", "none"))


def test_the_view_of_the_front_pass_exists_once_the_decoder_is_not_zero(images: Tensor) -> None:
    model = _new()
    assert "front-pass" not in adaptive_views(model.classifier(), images)
    bias = model.decoder.upscale[-1].bias
    assert isinstance(bias, nn.Parameter)
    with torch.no_grad():
        bias.fill_(1e-6)
    assert "front-pass" in adaptive_views(model.classifier(), images)


def test_at_the_start_the_straight_through_restoration_passes_the_networks_own_gradient(images: Tensor) -> None:
    """A new FPD restores x' = x, so that nothing is hidden; a trained one has the identity's gradient all the same."""
    model = _new(middle="none")
    own = _gradient(model.classifier(squash=False), images)
    views = adaptive_views(model.classifier(), images)
    assert _close(_gradient(views["bpda-restoration"].module, images), own)
    trained = as_trained(model)
    restored = trained.restore(images).detach().requires_grad_()
    logits = trained.head.pre_squash(trained.back(restored, images))
    mixture = torch.linspace(-1, 2, logits.numel()).double().reshape(logits.shape)
    (identity,) = torch.autograd.grad((logits * mixture).sum(), restored)
    straight = _gradient(adaptive_views(trained.classifier(), images)["bpda-restoration"].module, images)
    assert _close(straight, identity)
    assert not _close(straight, _gradient(trained.classifier(squash=False), images))


@pytest.mark.parametrize(("name", "sign"), [("joint", 1), ("joint-hidden", -1)])
def test_joint_losses_are_cross_entropy_and_ten_times_the_squared_error(images: Tensor, name: str, sign: int) -> None:
    model = _model()
    view = adaptive_views(model.classifier(), images)[name]
    assert view.loss is not None
    assert JOINT_WEIGHT == 10
    x = images.clone().requires_grad_()
    losses = view.loss(view.module(x), LABELS)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    z = images.clone().requires_grad_()
    restored = model.restore(z)
    ce = F.cross_entropy(model.head.pre_squash(model.back(restored, z)), LABELS, reduction="none")
    error = (restored - z).square().mean(dim=(1, 2, 3))
    expected = ce + sign * 10 * error
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), z)[0])
    assert losses.shape == (5,)


@PROTOCOLS
def test_joint_attacks_raise_and_lower_the_restoration_loss(images: Tensor, protocol: str) -> None:
    model = _model(protocol=protocol)
    views, error = adaptive_views(model.classifier(), images), {}
    for name in ("joint", "joint-hidden"):
        view = views[name]
        gradient = pgd(view.module, images, LABELS, eps=0.2, steps=10, loss=view.loss or "ce")
        with torch.no_grad():
            error[name] = float((model.restore(gradient) - gradient).square().mean())
    assert error["joint"] > error["joint-hidden"]


@pytest.mark.parametrize("images_dtype", [torch.float32, torch.float64])
def test_views_accept_float_and_double_images(images: Tensor, images_dtype: torch.dtype) -> None:
    model = _model().float()
    for name, view in adaptive_views(model.classifier(), images.float()).items():
        gradient = pgd(
            view.module, images.to(images_dtype), LABELS, eps=0.05, steps=2, loss=view.loss or "margin"
        )  # fmt: skip
        assert gradient.dtype == images_dtype, name
        assert not torch.equal(gradient, images.to(images_dtype)), name


def test_views_change_no_flags_hooks_gradients_or_weights(images: Tensor) -> None:
    model = _model().train()
    model.backbone.eval()
    next(model.parameters()).requires_grad_(False)

    def state() -> list[Any]:
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        flags = [m.training for m in model.modules()]
        return [hooks, flags, [(p.requires_grad, p.grad is None) for p in model.parameters()]]

    before, weights = state(), {k: v.clone() for k, v in model.state_dict().items()}
    views = adaptive_views(model.classifier(), images)
    assert state() == before
    for view in views.values():
        pgd(view.module, images, LABELS, eps=0.1, steps=2, loss=view.loss or "ce")
        assert state() == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    with pytest.raises(InputError), preserve_state(views["bpda-denoising"].module):
        views["bpda-denoising"].module(torch.rand(1, 1, 0, 8).double())
    assert state() == before


class _Rounded(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return (images * 15).round() / 15


def test_other_modules_have_a_straight_through_view(images: Tensor) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double().eval()
    assert list(adaptive_views(plain, images)) == [LOGITS]
    rounded = nn.Sequential(_Rounded(), plain).eval()
    views = adaptive_views(rounded, images)
    assert list(views) == [LOGITS, "straight-through"]
    view = views["straight-through"].module
    assert torch.equal(view(images), rounded(images))
    assert float(_gradient(rounded, images).abs().max()) == 0
    torch.testing.assert_close(_gradient(view, images), _gradient(plain, images))


def test_as_classifier(net: nn.Module) -> None:
    model = _model()
    assert isinstance(adaptive.as_classifier(model), nn.Module)
    assert adaptive.as_classifier(model) is not model
    classifier = model.classifier()
    assert adaptive.as_classifier(classifier) is classifier
    assert adaptive.as_classifier(net) is net


def test_views_of_an_fpd_add_its_pre_squash_logits(corners: Tensor) -> None:
    model = _model().float()
    views = adaptive.views(model.classifier())
    assert list(views) == [LOGITS, PRE_SQUASH]
    with torch.no_grad():
        squashed, pre_squash = (views[v].eval()(corners) for v in views)
    torch.testing.assert_close(squashed, pre_squash.tanh())
    assert list(adaptive.views(model.classifier(squash=False))) == [LOGITS]


def test_a_plain_module_has_one_view(net: nn.Module) -> None:
    assert adaptive.views(net) == {LOGITS: net}
    assert adaptive.as_classifier(net) is net


def test_views_leave_the_flags_of_a_partly_frozen_fpd() -> None:
    model = rf.enhance("resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8).train()
    model.backbone.eval()
    before = [m.training for m in model.modules()]
    adaptive.views(adaptive.as_classifier(model))
    assert [m.training for m in model.modules()] == before
