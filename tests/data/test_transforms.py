from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustfpd.config import AugmentConfig
from robustfpd.data.transforms import _affine, augment


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def still(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n = len(images)
    return torch.zeros(n), torch.zeros(n, 2), torch.ones(n)


def test_the_default_changes_nothing() -> None:
    images = torch.rand(4, 3, 7, 9)
    assert torch.equal(augment(images, AugmentConfig(), seeded()), images)


def test_a_flip_gives_the_image_or_its_mirror_half_the_time() -> None:
    images = torch.rand(400, 1, 5, 6)
    out = augment(images, AugmentConfig(flip=True), seeded())
    same = (out - images).abs().amax(dim=(1, 2, 3)) < 1e-5
    mirrored = (out - images.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert bool((same ^ mirrored).all())
    assert float(mirrored.float().mean()) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("quarters", [1, 2, 3, -1])
def test_rotation_by_quarter_turns_permutes_the_pixels_of_a_square(quarters: int) -> None:
    images = torch.rand(2, 3, 8, 8)
    _, shift, mirror = still(images)
    out = _affine(images, torch.full((2,), quarters * math.pi / 2), shift, mirror)
    turned = torch.rot90(images, quarters, dims=(2, 3))
    back = torch.rot90(images, -quarters, dims=(2, 3))
    assert min((out - turned).abs().max(), (out - back).abs().max()) < 1e-4


@pytest.mark.parametrize("size", [(16, 40), (40, 16), (31, 31)])
@pytest.mark.parametrize("degrees", [-60, 20, 90])
def test_rotation_keeps_lengths_and_angles_in_pixels(size: tuple[int, int], degrees: float) -> None:
    height, width = size
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = rows - (height - 1) / 2, columns - (width - 1) / 2
    angle = math.radians(degrees)

    def spot(at: tuple[float, float]) -> Tensor:
        return torch.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / 4).reshape(1, 1, height, width)

    at = (4.0, 2.0)
    out = _affine(spot(at), torch.tensor([angle]), torch.zeros(1, 2), torch.ones(1))
    expected = (
        at[0] * math.cos(angle) + at[1] * math.sin(angle),
        -at[0] * math.sin(angle) + at[1] * math.cos(angle),
    )
    assert (out - spot(expected)).abs().max() < 0.15
    centre = (float((out[0, 0] * x).sum() / out.sum()), float((out[0, 0] * y).sum() / out.sum()))
    assert centre == pytest.approx(expected, abs=0.15)


def test_translation_moves_by_whole_pixels_and_black_comes_in() -> None:
    images = torch.rand(1, 2, 6, 10)
    angle, _, mirror = still(images)
    right, down = 3, -2
    out = _affine(images, angle, torch.tensor([[-2 * right / 10, -2 * down / 6]]), mirror)
    expected = torch.zeros_like(images)
    expected[:, :, :4, 3:] = images[:, :, 2:, :7]
    assert torch.allclose(out, expected, atol=1e-5)


def test_shifts_reach_the_given_fraction_and_no_further() -> None:
    n, side = 500, 20
    images = torch.zeros(n, 1, side, side)
    images[:, :, 9:11, 9:11] = 1
    out = augment(images, AugmentConfig(translation=0.2), seeded())
    position = torch.arange(side) - (side - 1) / 2
    moved = torch.stack([(out.sum(dim=(1, d)) * position).sum(1) / out.sum(dim=(1, 2, 3)) for d in (2, 3)])
    assert float(moved.abs().max()) <= 0.2 * side + 1e-3
    assert float(moved.abs().amax(dim=1).min()) > 0.19 * side
    assert float(moved.mean(dim=1).abs().max()) < 0.5


def test_rotation_stays_within_its_angle() -> None:
    n, side = 300, 31
    images = torch.zeros(n, 1, side, side)
    images[:, :, 15, 25] = 1
    images = torch.nn.functional.avg_pool2d(images, 5, stride=1, padding=2)
    out = augment(images, AugmentConfig(rotation=30), seeded())[:, 0]
    position = torch.arange(side) - 15.0
    x = (out.sum(1) * position).sum(1)
    y = (out.sum(2) * position).sum(1)
    degrees = torch.rad2deg(torch.atan2(y, x)).abs()
    assert float(degrees.max()) < 31
    assert float(degrees.max()) > 28
    assert float(degrees.mean()) == pytest.approx(15, abs=2)


def test_brightness_scales_each_image_as_a_whole() -> None:
    images = torch.rand(200, 1, 4, 4) / 2
    ratio = augment(images, AugmentConfig(brightness=0.5), seeded()) / images
    assert torch.allclose(ratio, ratio[:, :, :1, :1].expand_as(ratio), atol=1e-5)
    assert float(ratio.min()) >= 0.5 - 1e-5
    assert float(ratio.max()) <= 1.5 + 1e-5
    assert float(ratio.amax(dim=(1, 2, 3)).std()) > 0.2


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    rotation=st.floats(0, 180),
    translation=st.floats(0, 1),
    flip=st.booleans(),
    brightness=st.floats(0, 1),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
)
def test_images_stay_in_range_and_the_seed_decides(
    rotation: float, translation: float, flip: bool, brightness: float, height: int, width: int
) -> None:
    config = AugmentConfig(rotation=rotation, translation=translation, flip=flip, brightness=brightness)
    images = torch.rand(3, 2, height, width, generator=seeded(7))
    before = images.clone()
    out = augment(images, config, seeded())
    assert out.shape == images.shape
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    assert torch.equal(out, augment(images, config, seeded()))
    assert torch.equal(images, before)


def test_another_seed_changes_other_images() -> None:
    images = torch.rand(8, 1, 8, 8)
    config = AugmentConfig(rotation=20, translation=0.1)
    state = torch.random.get_rng_state()
    assert not torch.equal(augment(images, config, seeded(0)), augment(images, config, seeded(1)))
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_image_on_its_own_is_treated_differently_from_its_neighbour() -> None:
    images = torch.rand(1, 1, 8, 8).expand(2, 1, 8, 8)
    out = augment(images, AugmentConfig(rotation=20), seeded())
    assert not torch.allclose(out[0], out[1])
