"""A Feature Pyramid Decoder around one small member of each convolutional family that timm has."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import timm
import torch

import robustfpd as rf
from robustfpd.errors import InputError

FAST = [
    "resnet_mini", "resnet18", "regnetx_002", "mobilenetv3_small_050", "convnext_atto", "ghostnet_100", "repvgg_a0",
    "hgnetv2_b0", "edgenext_xx_small", "fastvit_t8", "efficientnet_b0",
]  # fmt: skip
ALL = [
    "resnet18", "resnext50_32x4d", "wide_resnet50_2", "resnetv2_50", "seresnet50", "ecaresnet26t", "skresnet18",
    "res2net50_26w_4s", "resnest14d", "regnetx_002", "regnety_002", "densenet121", "dla34", "vgg11_bn", "darknet53",
    "cspresnet50", "cspdarknet53", "ese_vovnet19b_dw", "repvgg_a0", "ghostnet_100", "mobilenetv2_050",
    "mobilenetv3_small_050", "efficientnet_b0", "tf_efficientnetv2_b0", "mnasnet_050", "rexnet_100", "convnext_atto",
    "convnextv2_atto", "hgnetv2_b0", "inception_next_atto", "fastvit_t8", "edgenext_xx_small", "mobileone_s0",
    "dm_nfnet_f0", "eca_nfnet_l0", "nf_resnet26", "gernet_s", "dpn48b", "tresnet_m", "mambaout_femto",
    "legacy_seresnet18",
]  # fmt: skip
SIZES = [(3, (64, 64)), (1, (27, 33))]
PROTOCOLS = pytest.mark.parametrize("protocol", ["improved", "corrected"])


def assert_defended(name: str, channels: int, size: tuple[int, int], **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no activation modules to replace")
        warnings.filterwarnings("ignore", message=".*until its batch norms have seen training images")
        model = rf.enhance(name, num_classes=4, in_channels=channels, image_size=size, **options)
    out = model(torch.rand(2, channels, *size))
    assert out.logits.shape == (2, 4)
    assert bool(out.logits.isfinite().all())
    assert out.restored.shape == (2, channels, *size)
    (out.logits.square().sum() + out.restored.square().sum()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    if name != "resnet_mini":
        described: Any = timm.create_model(name, num_classes=0).feature_info
        assert model.backbone.channels == tuple(entry["num_chs"] for entry in described if entry["module"])


@pytest.mark.parametrize(("name", "channels", "size"), [(name, *SIZES[i % 2]) for i, name in enumerate(FAST)])
@PROTOCOLS
def test_a_family_can_be_defended(name: str, channels: int, size: tuple[int, int], protocol: str) -> None:
    assert_defended(name, channels, size, protocol=protocol)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "size"), SIZES)
@pytest.mark.parametrize("name", ALL)
def test_every_family_can_be_defended(name: str, channels: int, size: tuple[int, int]) -> None:
    assert_defended(name, channels, size)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "size"), SIZES)
@pytest.mark.parametrize("name", [name for name in ALL if name != "eca_nfnet_l0"])
def test_every_family_with_norms_can_be_defended_as_in_the_paper(
    name: str, channels: int, size: tuple[int, int]
) -> None:
    assert_defended(name, channels, size, protocol="corrected")


@pytest.mark.slow
def test_a_family_without_norms_can_be_defended_as_in_the_paper() -> None:
    assert_defended("eca_nfnet_l0", *SIZES[0], protocol="corrected")


@pytest.mark.slow
def test_cubic_denoising_that_overflows_is_refused_with_a_way_out() -> None:
    channels, size = SIZES[1]
    with pytest.raises(InputError, match=r"NaN or infinite logits .* denoise='dot'; use denoise='softmax'"):
        rf.enhance("eca_nfnet_l0", num_classes=5, in_channels=channels, image_size=size, protocol="corrected")


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "size"), SIZES)
@pytest.mark.parametrize("denoise", ["softmax", "gaussian", "none"])
def test_bounded_denoising_keeps_a_family_without_norms_finite(
    denoise: str, channels: int, size: tuple[int, int]
) -> None:
    assert_defended("eca_nfnet_l0", channels, size, denoise=denoise, protocol="corrected")
