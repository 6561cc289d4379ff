from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.attacks import bim, fgsm, pgd
from robustfpd.attacks.inputs import check_images, check_labels, check_logits
from robustfpd.config import check_eps
from robustfpd.errors import InputError

GOOD = torch.full((2, 1, 8, 8), 0.5)
LABELS = torch.tensor([0, 2])


def _with(value: float) -> Tensor:
    images = GOOD.clone()
    images[1, 0, 3, 3] = value
    return images


@pytest.fixture
def classifier() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


IMAGES = [
    (_with(float("nan")), "images must be finite, found 1 NaN or infinite pixels"),
    (_with(float("inf")), "images must be finite, found 1 NaN or infinite pixels"),
    (_with(1.25), r"images must lie in \[0, 1\], found \[0.5, 1.25\]; normalise inside the model"),
    (_with(-0.5), r"images must lie in \[0, 1\], found \[-0.5, 0.5\]; normalise inside the model"),
    (_with(255), r"images must lie in \[0, 1\], found \[0.5, 255\]; divide by 255"),
    (GOOD.to(torch.uint8), r"images must be floating point in \[0, 1\], found torch.uint8; divide uint8 by 255"),
    (GOOD[0], r"images must be N×C×H×W with at least one image, found shape \(1, 8, 8\)"),
    (GOOD[:0], r"images must be N×C×H×W with at least one image, found shape \(0, 1, 8, 8\)"),
    (GOOD[:, :0], r"images must be N×C×H×W with at least one image, found shape \(2, 0, 8, 8\)"),
    (GOOD.numpy(), "images must be a torch.Tensor, found ndarray"),
]

BAD_LABELS = [
    (torch.tensor([0.0, 1.0]), "labels must be integers, found torch.float32"),
    (torch.tensor([True, False]), "labels must be integers, found torch.bool"),
    (torch.tensor([0, -1]), "labels must not be negative, found -1"),
    (torch.tensor([0, 3]), "labels must be below the classifier's 3 classes, found 3"),
    (torch.tensor([0]), r"labels must have shape \(2,\), one per image, found \(1,\)"),
    (torch.eye(2, 3, dtype=torch.long), r"labels must have shape \(2,\), one per image, found \(2, 3\)"),
    ([0, 1], "labels must be a torch.Tensor, found list"),
]

RADII: list[tuple[str, Any, str]] = [
    ("linf", 8, "eps must be at most 1 in linf .*, found 8; 8/255 is eight grey levels"),
    ("linf", 1.01, "eps must be at most 1 in linf .*, found 1.01"),
    ("linf", 0, "eps must be a positive number, found 0"),
    ("l2", 0.0, "eps must be a positive number, found 0.0"),
    ("l1", -1, "eps must be a positive number, found -1"),
    ("l2", float("nan"), "eps must be a positive number, found nan"),
    ("l2", float("inf"), "eps must be a positive number, found inf"),
    ("l2", "0.1", "eps must be a positive number, found '0.1'"),
    ("l2", True, "eps must be a positive number, found True"),
]


@pytest.mark.parametrize("attack", [pgd, fgsm, bim])
@pytest.mark.parametrize(("images", "message"), IMAGES)
def test_attacks_refuse_images(attack: Any, classifier: nn.Module, images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attack(classifier, images, LABELS, eps=0.1)


@pytest.mark.parametrize("attack", [pgd, fgsm, bim])
@pytest.mark.parametrize(("labels", "message"), BAD_LABELS)
def test_attacks_refuse_labels(attack: Any, classifier: nn.Module, labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attack(classifier, GOOD, labels, eps=0.1)


@pytest.mark.parametrize("attack", [pgd, fgsm, bim])
@pytest.mark.parametrize(("norm", "eps", "message"), RADII)
def test_attacks_refuse_radii(attack: Any, classifier: nn.Module, norm: str, eps: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attack(classifier, GOOD, LABELS, eps=eps, norm=norm)


class _Returns(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, images: Tensor) -> Any:
        return self.what(images.flatten(1)[:, :3])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: (x, x), "classifier must return logits N×K, found tuple$"),
        (lambda x: x / 0 * 0, "classifier returned NaN or infinite logits"),
        (lambda x: x[:, 0], r"classifier must return logits N×K with N=2, found \(2,\)"),
        (lambda x: x[:1], r"classifier must return logits N×K with N=2, found \(1, 3\)"),
        (lambda x: x[:, :2], "labels must be below the classifier's 2 classes, found 2"),
        (lambda _: None, "classifier must return logits N×K, found NoneType"),
    ],
)
def test_attacks_refuse_what_is_no_logits(what: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pgd(_Returns(what), GOOD, LABELS, eps=0.1, steps=1)


def test_an_fpd_itself_is_refused_with_a_hint() -> None:
    model = rf.enhance("resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8)
    with pytest.raises(InputError, match=r"found FPDOutput; attack model.classifier\(\)"):
        fgsm(model, GOOD, LABELS, eps=0.1)
    assert fgsm(model.classifier(), GOOD, LABELS, eps=0.1).shape == GOOD.shape


def test_checks_return_what_is_right_and_name_the_argument() -> None:
    assert check_images(GOOD) is GOOD
    assert check_images(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1).double()).dtype == torch.float64
    assert check_labels(LABELS.to(torch.uint8), 2).dtype == torch.int64
    assert check_logits(torch.zeros(2, 3), LABELS).shape == (2, 3)
    assert check_eps(8 / 255, "linf") == 8 / 255
    assert check_eps(1, "linf") == 1.0
    assert check_eps(12, "l1") == 12.0
    with pytest.raises(InputError, match=r"^test images must be a torch.Tensor"):
        check_images(None, "test images")
    with pytest.raises(InputError, match=r"^targets must not be negative"):
        check_labels(torch.tensor([-2]), 1, "targets")
    with pytest.raises(InputError, match=r"^radius must be a positive number"):
        check_eps(-1, "l2", "radius")


@pytest.mark.parametrize("eps", [np.float32(0.125), np.float64(0.125), np.array(0.125), torch.tensor(0.125)])
def test_numbers_of_numpy_and_torch_are_radii(eps: Any) -> None:
    assert check_eps(eps, "linf") == 0.125
