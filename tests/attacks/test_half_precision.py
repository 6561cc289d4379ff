from __future__ import annotations

import copy

import pytest
import torch
from tests.fpds import as_trained, gated
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.attacks import adaptive, apgd_ce, pgd, square
from robustfpd.attacks.base import Attack, QueryCounter
from robustfpd.attacks.half_precision import HALF, SinglePrecision
from robustfpd.attacks.losses import cross_entropy, dlr, margin, targeted_dlr
from robustfpd.attacks.norms import lp_ball
from robustfpd.config import NORMS, Norm


def _half(net: nn.Sequential, dtype: torch.dtype) -> nn.Sequential:
    return copy.deepcopy(net).to(dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_logits_are_those_of_the_rounded_images(net: nn.Sequential, corners: Tensor, dtype: torch.dtype) -> None:
    half = _half(net, dtype)
    logits = SinglePrecision(half, dtype)(corners)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, half(corners.to(dtype)).float())


def test_gradients_of_confident_images_do_not_underflow(corners: Tensor) -> None:
    linear = nn.Linear(64, 2)
    linear.bias.data = torch.tensor([20.0, 0.0])
    half, labels = _half(nn.Sequential(nn.Flatten(), linear), torch.float16), torch.zeros(12, dtype=torch.long)

    def gradient(classifier: nn.Module, images: Tensor) -> Tensor:
        x = images.clone().requires_grad_()
        (found,) = torch.autograd.grad(cross_entropy(classifier(x), labels).sum(), x)
        return found.flatten(1).float()

    assert float(gradient(half, corners.half()).abs().max()) == 0  # as it is without the wrapper
    ours = gradient(SinglePrecision(half, torch.float16), corners)
    # The true class has probability 1 in float32, so that its logit has no gradient there either.
    assert bool((torch.cosine_similarity(ours / ours.abs().amax(), linear.weight[1:]) > 0.99).all())
    assert 1e-12 < float(ours.abs().max()) < 1e-7  # scaled back


def test_a_wrapped_classifier_has_its_own_state(net: nn.Sequential) -> None:
    assert list(SinglePrecision(net, torch.float16).state_dict()) == list(net.state_dict())
    assert not SinglePrecision(net.eval(), torch.float16).training


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("norm", NORMS)
def test_attacks_on_half_images_stay_in_the_ball_and_misclassify(
    net: nn.Sequential, corners: Tensor, norm: Norm, dtype: torch.dtype
) -> None:
    half, images = _half(net, dtype), corners.to(dtype)
    with torch.no_grad():
        labels = half(images).argmax(1)
    eps = {"linf": 0.1, "l2": 0.7, "l1": 4.0}[norm]
    attacks: list[tuple[Attack[...], dict[str, int]]]
    attacks = [(pgd, {"steps": 20}), (apgd_ce, {"steps": 20}), (square, {"queries": 300})]
    for attack, options in attacks:
        adversarial = attack(half, images, labels, eps=eps, norm=norm, **options)
        single = attack(net, images.float(), labels, eps=eps, norm=norm, **options)
        assert adversarial.dtype == dtype
        size = lp_ball(norm).norm(adversarial.double() - images.double())
        rounding = torch.finfo(dtype).eps
        assert float(size.max()) <= eps * (1 + rounding) + rounding
        with torch.no_grad():
            found, expected = ((z.argmax(1) != labels).sum() for z in (half(adversarial), net(single)))
            assert int(found) >= int(expected) - 1 > 3


def test_queries_of_half_images_are_recorded(net: nn.Sequential, corners: Tensor) -> None:
    counter = QueryCounter(_half(net, torch.bfloat16))
    square(counter, corners.bfloat16(), torch.arange(12) % 3, eps=0.01, queries=5)
    assert counter.per_image is not None
    assert counter.per_image.shape == (12,)


@pytest.mark.parametrize("loss", [cross_entropy, margin, dlr, lambda z, y: targeted_dlr(z, y, (y + 1) % 4)])
def test_losses_of_half_logits_are_those_of_float32(loss: nn.Module) -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0], [4.0, 1.0, 0.5, -30.0]]).half()  # tied logits: a denominator of zero
    labels = torch.tensor([0, 1])
    losses = loss(logits, labels)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, loss(logits.float(), labels))
    assert losses.isfinite().all()


def test_a_wrapped_fpd_has_the_views_of_the_fpd() -> None:
    options = gated(mean=(0.4,), std=(0.2,), head="tanh")
    fpd = as_trained(
        rf.enhance("resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8, **options)
    ).eval()
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    own = adaptive.adaptive_views(copy.deepcopy(fpd).classifier(), images)
    wrapped = adaptive.adaptive_views(SinglePrecision(fpd.classifier().bfloat16(), torch.bfloat16), images)
    assert list(wrapped) == list(own)
    for name, view in wrapped.items():
        with torch.no_grad():
            assert torch.allclose(view.module(images), own[name].module(images), atol=0.1)
