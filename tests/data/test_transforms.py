from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import RandomResizedCrop, functional

from robustfpd.config import AugmentConfig
from robustfpd.data.transforms import ASPECTS, _affine, _crops, add_uniform_noise, augment, centre_crop, uniform_like
from robustfpd.distributed import ProcessGroup


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


def test_equal_images_of_a_batch_are_transformed_differently() -> None:
    images = torch.rand(1, 1, 8, 8).expand(2, 1, 8, 8)
    out = augment(images, AugmentConfig(rotation=20), seeded())
    assert not torch.allclose(out[0], out[1])


def before(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Augmentation as it was before crops, expansion and contrast: trained models depend on these very bits."""
    n = len(images)

    def draw() -> Tensor:
        return torch.rand(n, generator=generator).mul(2).sub(1)

    if config.rotation or config.translation or config.flip:
        angle = draw() * math.radians(config.rotation)
        shift = torch.stack([draw(), draw()], dim=1) * 2 * config.translation
        mirror = torch.where(draw() < 0, -1.0, 1.0) if config.flip else torch.ones(n)
        aspect = images.shape[2] / images.shape[3]
        cos, sin = angle.cos(), angle.sin()
        rows = [mirror * cos, -sin * aspect, shift[:, 0], mirror * sin / aspect, cos, shift[:, 1]]
        grid = F.affine_grid(torch.stack(rows, dim=1).reshape(-1, 2, 3), list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, align_corners=False)
    if config.brightness:
        images = images * (1 + config.brightness * draw()).reshape(n, 1, 1, 1)
    return images.clamp(0, 1)


@pytest.mark.parametrize("rotation", [0, 15])
@pytest.mark.parametrize("translation", [0, 0.1])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("brightness", [0, 0.3])
@pytest.mark.parametrize("size", [(28, 28), (7, 12)])
def test_earlier_transforms_keep_their_exact_values(
    rotation: float, translation: float, flip: bool, brightness: float, size: tuple[int, int]
) -> None:
    config = AugmentConfig(rotation=rotation, translation=translation, flip=flip, brightness=brightness)
    images = torch.rand(5, 3, *size, generator=seeded(2))
    draws, draws_before = seeded(1), seeded(1)
    assert torch.equal(augment(images, config, draws), before(images, config, draws_before))
    assert torch.equal(augment(images, config, draws, size=size), before(images, config, draws_before))
    assert torch.equal(draws.get_state(), draws_before.get_state())


def waves(height: int, width: int, slow: int = 1) -> Tensor:
    """Smooth pictures, so that one interpolation more or less hardly shows."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    phases = torch.arange(3).reshape(1, 3, 1, 1)
    return 0.5 + 0.4 * torch.sin(rows / (9 * slow) + phases) * torch.cos(columns / (7 * slow) - phases)


@pytest.mark.parametrize("size", [(5, 8), (4, 6), (1, 1), (3, 9)])
def test_without_random_changes_the_result_is_the_centre_crop(size: tuple[int, int]) -> None:
    images = torch.rand(4, 3, 5, 9)
    assert torch.equal(augment(images, AugmentConfig(), seeded(), size=size), centre_crop(images, size))


@pytest.mark.parametrize("size", [(20, 32), (19, 32), (20, 31), (16, 24), (15, 23)])
def test_geometry_that_changes_nothing_samples_the_centre_crop(size: tuple[int, int]) -> None:
    images = torch.rand(3, 2, 20, 32)
    angle, shift, mirror = still(images)
    assert torch.allclose(_affine(images, angle, shift, mirror, size=size), centre_crop(images, size), atol=1e-5)
    mirrored = _affine(images, angle, shift, -mirror, size=size)
    assert torch.allclose(mirrored, centre_crop(images.flip(3), size), atol=1e-5)
    expanded = _affine(images, angle, shift, mirror, size=size, expand=True)
    assert torch.allclose(expanded, centre_crop(images, size), atol=1e-5)


def box(top: int, left: int, high: int, wide: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A crop in pixels as extent and middle in grid units."""
    middle = [2 * (left + wide / 2) / width - 1, 2 * (top + high / 2) / height - 1]
    return torch.tensor([[wide / width, high / height]]), torch.tensor([middle])


@pytest.mark.parametrize("crop", [(3, 5, 30, 40), (10, 24, 36, 24), (0, 0, 48, 48), (7, 0, 41, 39)])
@pytest.mark.parametrize("shape", [(48, 48), (46, 72)])
def test_a_crop_is_torchvisions(crop: tuple[int, int, int, int], shape: tuple[int, int]) -> None:
    top, left, high, wide = min(crop[0], shape[0] - 40), crop[1], min(crop[2], 40), crop[3]
    images = waves(*shape)
    angle, shift, mirror = still(images)
    found = _affine(images, angle, shift, mirror, box=box(top, left, high, wide, *shape))
    expected = functional.resized_crop(images, top, left, high, wide, list(shape), antialias=False)
    inside = (..., slice(2, -2), slice(2, -2))  # at its edges torchvision does not look beyond the crop
    assert (found - expected)[inside].abs().max() < 1e-4


@pytest.mark.parametrize("degrees", [-90, -40, -15, 10, 45])
@pytest.mark.parametrize("shape", [(256, 256), (192, 320)])
def test_expansion_is_torchvisions(degrees: float, shape: tuple[int, int]) -> None:
    images = waves(*shape, slow=4)
    _, shift, mirror = still(images)
    found = _affine(images, torch.tensor([math.radians(degrees)]), shift, mirror, expand=True)
    turned = functional.rotate(images, degrees, functional.InterpolationMode.BILINEAR, expand=True)
    expected = functional.resize(turned, list(shape), antialias=False)
    assert (found - expected).abs().mean() < 0.01  # its frame is of whole pixels, and its edges are hard
    other = functional.rotate(images, -degrees, functional.InterpolationMode.BILINEAR, expand=True)
    assert (found - functional.resize(other, list(shape), antialias=False)).abs().mean() > 0.05


def test_expansion_keeps_the_complete_image() -> None:
    images = torch.ones(200, 1, 40, 40)
    out = augment(images, AugmentConfig(rotation=45, expand=True), seeded())
    assert torch.allclose(out.sum(dim=(1, 2, 3)), _shrunk_area(images, 45), rtol=0.02)
    edge = torch.cat([out[..., 0, :], out[..., -1, :], out[..., :, 0], out[..., :, -1]], dim=2)
    tilted = out.sum(dim=(1, 2, 3)) < 1500
    assert float(edge[tilted].mean()) < 0.15


def _shrunk_area(images: Tensor, degrees: float) -> Tensor:
    """Area of turned and shrunk white squares, with the angles that the seed gives."""
    draws = torch.rand(len(images), generator=seeded()).mul(2).sub(1)
    angle = draws * math.radians(degrees)
    return images.shape[-1] ** 2 / (angle.cos().abs() + angle.sin().abs()).square()


def test_the_published_caltech_pipeline() -> None:
    images, crop, degrees = waves(64, 64), (4, 6, 54, 58), 15.0
    out = _affine(
        images, torch.tensor([math.radians(degrees)]), torch.zeros(1, 2), -torch.ones(1), size=(56, 56),
        box=box(*crop, 64, 64),
    )  # fmt: skip
    expected = functional.resized_crop(images, *crop, [64, 64], antialias=False)
    expected = functional.rotate(expected, degrees, functional.InterpolationMode.BILINEAR)
    expected = functional.center_crop(functional.hflip(expected), [56, 56])
    inside = (..., slice(8, -8), slice(8, -8))  # beyond the crop torchvision sees black, we see the picture
    assert (out - expected)[inside].abs().max() < 0.01


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 100), (100, 40), (30, 38)])
@pytest.mark.parametrize("smallest", [0.2, 0.8])
def test_crops_lie_inside_with_the_area_and_proportions_of_torchvision(
    height: int, width: int, smallest: float
) -> None:
    n, draws = 4000, seeded()
    extent, middle = _crops(lambda: torch.rand(n, generator=draws).mul(2).sub(1), smallest, height, width)
    assert bool((middle.abs() + extent <= 1 + 1e-6).all())
    area, aspect = extent.prod(dim=1), extent[:, 0] * width / (extent[:, 1] * height)
    assert float(aspect.min()) >= ASPECTS[0] - 1e-4
    assert float(aspect.max()) <= ASPECTS[1] + 1e-4
    assert float(area.max()) <= 1 + 1e-6
    if 0.75 < width / height < 1.33:
        assert float(area.min()) >= smallest - 1e-4
    with torch.random.fork_rng(devices=[]):  # torchvision takes no generator
        torch.manual_seed(0)
        picture = torch.zeros(3, height, width)
        theirs = torch.tensor(
            [RandomResizedCrop.get_params(picture, [smallest, 1.0], list(ASPECTS)) for _ in range(n)]
        ).double()  # top left high wide
    their_area, their_aspect = theirs[:, 2] * theirs[:, 3] / (height * width), theirs[:, 3] / theirs[:, 2]
    for ours, expected in ((area, their_area), (aspect.log(), their_aspect.log())):
        assert float(ours.mean()) == pytest.approx(float(expected.mean()), abs=0.02)
        assert float(ours.std()) == pytest.approx(float(expected.std()), abs=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_is_torchvisions(channels: int) -> None:
    images = torch.rand(60, channels, 6, 7, generator=seeded(5))
    factors = 1 + 0.6 * torch.rand(60, generator=seeded()).mul(2).sub(1)
    out = augment(images, AugmentConfig(contrast=0.6), seeded())
    for image, factor, found in zip(images, factors, out, strict=True):
        assert torch.allclose(found, functional.adjust_contrast(image, float(factor)), atol=1e-5)
    assert float(factors.min()) < 0.5
    assert float(factors.max()) > 1.5


def test_brightness_is_cut_before_contrast_as_torchvision_does() -> None:
    images = torch.rand(50, 3, 5, 5, generator=seeded(5))
    draws = seeded()
    bright, contrast = (1 + 0.8 * torch.rand(50, generator=draws).mul(2).sub(1) for _ in range(2))
    out = augment(images, AugmentConfig(brightness=0.8, contrast=0.8), seeded())
    for i, image in enumerate(images):
        expected = functional.adjust_contrast(functional.adjust_brightness(image, float(bright[i])), float(contrast[i]))
        assert torch.allclose(out[i], expected, atol=1e-5)


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    crop=st.floats(0.05, 1),
    rotation=st.floats(0, 180),
    expand=st.booleans(),
    flip=st.booleans(),
    contrast=st.floats(0, 1),
    sides=st.tuples(*[st.integers(1, 14)] * 4),
    channels=st.integers(1, 4),
)
def test_all_changes_keep_range_size_and_seed(
    crop: float, rotation: float, expand: bool, flip: bool, contrast: float, sides: tuple[int, ...], channels: int
) -> None:
    config = AugmentConfig(crop=crop, rotation=rotation, expand=expand, flip=flip, contrast=contrast, brightness=0.2)
    height, width = max(sides[0], sides[2]), max(sides[1], sides[3])
    size = (min(sides[0], sides[2]), min(sides[1], sides[3]))
    images = torch.rand(3, channels, height, width, generator=seeded(7))
    out = augment(images, config, seeded(), size=size)
    assert out.shape == (3, channels, *size)
    assert 0 <= float(out.min()) <= float(out.max()) <= 1
    assert torch.equal(out, augment(images, config, seeded(), size=size))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(eps=st.floats(1e-3, 1), seed=st.integers(0, 2**31))
def test_noise_stays_within_its_half_width(eps: float, seed: int) -> None:
    images = torch.rand(4, 3, 5, 7, generator=seeded(seed + 1), dtype=torch.float64)
    noise = add_uniform_noise(images, eps, seeded(seed)) - images
    assert noise.abs().max() <= eps + 1e-12
    assert noise.abs().max() > 0.8 * eps


def test_noise_is_uniform_about_zero() -> None:
    draws = uniform_like(torch.zeros(200_000), seeded())
    error = 4 / 200_000**0.5  # four standard errors of a variable with |x| ≤ 1
    assert draws.mean().abs() < error
    assert (draws.square().mean() - 1 / 3).abs() < error
    quarters = torch.histc(draws, bins=4, min=-1, max=1) / 200_000
    assert (quarters - 0.25).abs().max() < error


def test_noise_of_a_part_of_the_batch_is_that_part_of_the_noise() -> None:
    images = torch.rand(6, 1, 4, 4)
    whole = add_uniform_noise(images, 0.3, seeded())
    for rank in range(2):
        group = ProcessGroup(rank, 2)
        part = add_uniform_noise(images[group.batch_shard], 0.3, seeded(), 1.0, group)
        assert torch.equal(part, whole[group.batch_shard])


def test_noise_is_not_clipped() -> None:
    white = add_uniform_noise(torch.ones(1000), 0.1, seeded())
    black = add_uniform_noise(torch.zeros(1000), 0.1, seeded())
    assert (white > 1).float().mean() == pytest.approx(0.5, abs=0.08)
    assert (black < 0).float().mean() == pytest.approx(0.5, abs=0.08)


def test_the_generator_determines_the_noise() -> None:
    images = torch.rand(2, 1, 4, 4)
    state = torch.random.get_rng_state()
    first = add_uniform_noise(images, 0.3, seeded())
    assert torch.equal(first, add_uniform_noise(images, 0.3, seeded()))
    assert not torch.equal(first, add_uniform_noise(images, 0.3, seeded(1)))
    assert torch.equal(state, torch.random.get_rng_state())


def test_no_noise_returns_the_images_themselves() -> None:
    images = torch.rand(2, 1, 4, 4)
    assert add_uniform_noise(images, 0, seeded()) is images


def test_noise_does_not_change_its_input() -> None:
    images = torch.rand(2, 1, 4, 4)
    before = images.clone()
    add_uniform_noise(images, 0.5, seeded())
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_keeps_type_and_shape(dtype: torch.dtype) -> None:
    noisy = add_uniform_noise(torch.zeros(2, 3, 4, 5, dtype=dtype), 0.1, seeded())
    assert noisy.dtype == dtype
    assert noisy.shape == (2, 3, 4, 5)


def test_pad_shifts_by_whole_pixels_equally_often() -> None:
    images = torch.zeros(4000, 2, 5, 6)
    images[:, :, 2, 3] = torch.tensor([0.5, 1.0])
    out = augment(images, AugmentConfig(pad=1), seeded())
    assert out.shape == images.shape
    places = (out[:, 1] == 1.0).nonzero()
    assert len(places) == 4000
    counts = torch.zeros(3, 3)
    for _, row, column in places.tolist():
        counts[row - 1, column - 2] += 1
    assert float(counts.sum()) == 4000
    assert float((counts / 4000 - 1 / 9).abs().max()) < 0.02
    assert torch.equal(out[:, 0], out[:, 1] * 0.5)  # both channels have the same shift


def test_pad_fills_with_black_and_cuts_at_the_border() -> None:
    images = torch.ones(500, 1, 4, 4)
    out = augment(images, AugmentConfig(pad=2), seeded())
    kept = out.sum(dim=(1, 2, 3))
    assert set(kept.int().tolist()) == {(4 - i) * (4 - j) for i in range(3) for j in range(3)}
    assert set(out.flatten().tolist()) == {0.0, 1.0}


@given(st.floats(0.1, 1.0))
@settings(deadline=None)
def test_cutout_blackens_one_rectangle_of_at_most_its_side(side: float) -> None:
    out = augment(torch.ones(64, 2, 10, 20), AugmentConfig(cutout=side), seeded())
    for image in out:
        black = image == 0
        assert torch.equal(black[0], black[1])
        rows, columns = (black[0].any(dim=axis).nonzero().flatten() for axis in (1, 0))
        if len(rows):
            assert black[0][rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert int(black[0].sum()) == len(rows) * len(columns)
        assert len(rows) <= side * 10 + 1
        assert len(columns) <= side * 20 + 1
    assert float((out == 0).float().mean()) > 0.1 * side**2


def test_the_centre_of_a_cutout_is_uniform() -> None:
    out = augment(torch.ones(4000, 1, 8, 8), AugmentConfig(cutout=0.25), seeded())
    share = (out == 0).float().mean(dim=0)[0]
    assert float((share[1:7, 1:7] - 1 / 16).abs().max()) < 0.02  # 2×2 of 64 pixels around any centre
