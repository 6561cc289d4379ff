from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.fpds import as_trained, gated
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.data import ImageSet
from robustfpd.errors import InputError
from robustfpd.evaluation import evaluate
from robustfpd.evaluation.inputs import auto_batch_size, block_size, in_space
from robustfpd.models import FPD, Baseline, build

if TYPE_CHECKING:
    from tests.evaluation.conftest import Data, Linear

    from robustfpd.config import Norm

    Digits = tuple[nn.Module, Tensor, Tensor]


@pytest.mark.parametrize("classifier", [lambda x: x, None, nn.Linear, "resnet18", torch.zeros(3)])
def test_what_is_no_module_is_refused(data: Data, classifier: Any) -> None:
    with pytest.raises(InputError, match=f"classifier must be a torch.nn.Module, found {type(classifier).__name__}$"):
        evaluate(classifier, data, eps=0.1)
    with pytest.raises(InputError, match=r"surrogate 'baseline' must be a torch.nn.Module"):
        evaluate(nn.Flatten(), data, eps=0.1, surrogates={"baseline": classifier})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (([[1.0]], [0]), r"batches of list|must be a torch.Tensor"),
        ((torch.rand(0, 1, 6, 6), torch.zeros(0, dtype=torch.long)), r"at least one image, found shape \(0, 1, 6, 6\)"),
        (iter(()), "data must hold at least one image, found none"),
        (7, r"data must be \(images, labels\) or batches of such, found int"),
        (None, r"data must be \(images, labels\) or batches of such, found NoneType"),
        ((torch.rand(2, 1, 6, 6).numpy(), [0, 1]), "images must be a torch.Tensor, found ndarray"),
        ([torch.rand(2, 1, 6, 6)], "found batches of Tensor"),
        ({"images": 1}, "found batches of str"),
        (
            [(torch.rand(2, 1, 6, 6), torch.zeros(2).long()), (torch.rand(2, 1, 7, 7), torch.zeros(2).long())],
            "batches of data have different shapes",
        ),
    ],
)
def test_data_that_are_none_are_refused(linear: Linear, data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(linear, data, eps=0.1)
    assert linear.batches == []


@pytest.mark.parametrize(
    ("eps", "norm", "message"),
    [
        (-1.0, "l1", "eps must be 0 or a positive number, found -1.0"),
        (float("nan"), "linf", "eps must be 0 or a positive number, found nan"),
        (float("inf"), "l2", "eps must be 0 or a positive number, found inf"),
        (8.0, "linf", "eps must be at most 1 in linf .* found 8.0; 8/255 is eight grey levels"),
        ("0.1", "linf", "eps must be a number or several, found the text '0.1'"),
    ],
)
def test_radii_that_are_none_are_refused(linear: Linear, data: Data, eps: Any, norm: Norm, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(linear, data, eps=eps, norm=norm)
    assert linear.batches == []


def test_large_radii_are_radii_in_other_norms(linear: Linear, data: Data) -> None:
    assert evaluate(linear, data, suite="first-look", eps=8.0, norm="l2").worst_case[0].eps == 8


def test_blocks_follow_from_what_was_asked_alone() -> None:
    assert [block_size(n, None) for n in (1, 60, 256, 300, 1000, 1025, 50_000)] == [64, 64, 64, 75, 250, 256, 256]
    assert block_size(1000, 512) == 512
    cpu, cuda, small = torch.device("cpu"), torch.device("cuda"), torch.zeros(1, 1, 28, 28)
    assert auto_batch_size(small, cpu, 250) == 64
    assert auto_batch_size(torch.zeros(1, 3, 224, 224), cpu, 250) == 4
    assert auto_batch_size(torch.zeros(1, 3, 2000, 2000), cpu, 250) == 1
    assert auto_batch_size(small, cuda, 250) == 250


@pytest.mark.parametrize("batch_size", [0, -3, 2.5, "large"])
def test_batch_sizes_that_are_none_are_refused(digits: Digits, batch_size: Any) -> None:
    with pytest.raises(InputError, match="batch_size must be"):
        evaluate(digits[0], digits[1:], eps=0.03, batch_size=batch_size)


def _model(plain: bool) -> FPD | Baseline:
    fpd = as_trained(
        rf.enhance(
            "resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8,
            **gated(mean=(0.4,), std=(0.2,)),
        )
    ).eval()  # fmt: skip
    return build(fpd.task, fpd.config.baseline()).eval() if plain else fpd


def _images() -> ImageSet:
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=draws)
    return ImageSet(pixels, torch.arange(12) % 3)


@pytest.mark.parametrize("plain", [False, True])
def test_normalised_space_is_the_same_classifier_on_images_cut_to_0_and_1_there(plain: bool) -> None:
    model, images = _model(plain), _images()
    pixels, labels = images.floats()
    classifier, (given, same) = in_space(model.classifier(), images, "normalised")
    assert torch.equal(labels, same)
    assert (float(given.min()), float(given.max())) == (0.0, 1.0)
    inside = (given > 0) & (given < 1)
    assert torch.allclose(given[inside] * 0.2 + 0.4, pixels[inside], atol=1e-6)
    seen = pixels.clamp(0.4, 0.6)
    assert torch.allclose(classifier(given), model.classifier()(seen), atol=1e-5)


def test_a_radius_there_is_that_many_standard_deviations_in_pixels() -> None:
    classifier, data = in_space(_model(True).classifier(), _images(), "normalised")
    found = rf.attacks.fgsm(classifier, *data, eps=0.1)
    change = (found - data[0]).abs().max() * 0.2
    assert float(change) == pytest.approx(0.02, abs=1e-6)


def test_pixels_change_nothing() -> None:
    model = _model(False).classifier()
    images = _images()
    classifier, (given, _) = in_space(model, images, "pixels")
    assert classifier is model
    assert torch.equal(given, images.floats()[0])


def test_a_foreign_classifier_has_no_normalised_space() -> None:
    class Foreign(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3]

    with pytest.raises(InputError, match="needs a robustfpd model"):
        in_space(Foreign(), _images(), "normalised")
