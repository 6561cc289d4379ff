from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.data import ImageSet
from robustfpd.errors import InputError
from robustfpd.evaluation.normalised_space import in_space
from robustfpd.models import FPD, Baseline, build


def _model(plain: bool) -> FPD | Baseline:
    fpd = rf.enhance(
        "resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8, mean=(0.4,), std=(0.2,)
    ).eval()
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
