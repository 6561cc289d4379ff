from __future__ import annotations

import pytest
import torch

import robustfpd as rf
from robustfpd.errors import InputError
from robustfpd.models.backbones import from_timm
from robustfpd.models.small_networks import ConvMini, resnet_mini


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (20, 41)])
@pytest.mark.parametrize("classes", [0, 5])
def test_conv_mini_takes_images_of_any_size(size: tuple[int, int], classes: int) -> None:
    net = ConvMini(3, classes, width=8).eval()
    assert net(torch.rand(2, 3, *size)).shape == (2, classes or 128)


def test_conv_mini_pools_maps_of_another_size_only() -> None:
    net = ConvMini(1, 5, width=8).eval()
    seen: list[torch.Tensor] = []
    net.hidden.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net.stage3.register_forward_hook(lambda _, inputs, output: seen.append(output))
    net(torch.rand(1, 1, 28, 28))
    assert seen[1] is seen[0]
    net(torch.rand(1, 1, 56, 56))
    assert torch.allclose(seen[3], torch.nn.functional.avg_pool2d(seen[2], 2), atol=1e-6)


def test_the_first_convolution_sees_single_pixels() -> None:
    net = ConvMini(1, 5, width=8).eval()
    x = torch.rand(1, 1, 28, 28)
    moved = x.clone()
    moved[0, 0, 3, 4] += 0.5
    convolution = net.stem[0]
    changed = (convolution(moved) - convolution(x)).abs().sum(dim=1)[0] > 0
    assert changed.nonzero().tolist() == [[3, 4]]


def test_a_width_in_the_name_scales_every_stage() -> None:
    for name, stages in (("resnet_mini", 5), ("conv_mini", 4)):
        plain, wide = from_timm(name, 1).module, from_timm(f"{name}_64", 1).module
        default = {"resnet_mini": 16, "conv_mini": 32}[name]
        for key, weight in plain.state_dict().items():
            if weight.ndim == 4:
                assert wide.state_dict()[key].shape[0] == weight.shape[0] * 64 // default, key
        assert len(from_timm(name, 1).stages) == stages
    assert sum(p.numel() for p in resnet_mini(3, 10, width=32).parameters()) < 1_240_000


def test_an_fpd_around_conv_mini_starts_as_the_network() -> None:
    torch.manual_seed(0)
    model = rf.enhance("conv_mini_8", num_classes=5, in_channels=1, image_size=28, small_stem=False).eval()
    x = torch.rand(2, 1, 28, 28)
    out = model(x)
    assert torch.equal(out.restored, x)
    assert torch.allclose(out.logits, model.head(model.backbone.classify(x)), atol=1e-6)


@pytest.mark.parametrize("name", ["conv_mini_0", "conv_mini_", "resnet_mini_x", "conv_mini_12345"])
def test_other_names_are_unknown(name: str) -> None:
    with pytest.raises(InputError, match=f"unknown backbone '{name}'; did you mean"):
        from_timm(name, 1)
