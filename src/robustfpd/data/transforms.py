"""Transforms of batches on the images' device: augmentation, training noise, centre crop.

Each image of a batch has its own random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from robustfpd.config import AugmentConfig
from robustfpd.distributed import SINGLE_PROCESS, ProcessGroup

ASPECTS = (3 / 4, 4 / 3)
"""Aspect ratios (width / height) of random crops."""
ATTEMPTS = 10
"""Random crops drawn for each image; the first that fits is used."""
LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in the grey image, as in torchvision."""


def augment(
    images: Tensor, config: AugmentConfig, generator: torch.Generator, *, size: tuple[int, int] | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Tensor:  # fmt: skip
    """Randomly crop, rotate, shift and flip images, change their brightness and contrast, and cut squares out.

    The geometric transform is a single interpolation. Its steps, in torchvision's terms: RandomResizedCrop to the
    images' own size, RandomRotation (with `expand`: then Resize to that size), shift, flip, CenterCrop to `size`.

    Args:
        images: N×C×H0×W0 in [0, 1].
        config: range of each transform.
        generator: source of the random numbers.
        size: height and width of the result; None keeps the images' own.
        group: the ranks that share the batch; numbers are drawn for the batch of all ranks.

    Returns:
        N×C×H×W in [0, 1]; pixels from outside the image are black. Without a geometric transform, the centre crop.
    """
    n = len(images)
    size = size or (images.shape[-2], images.shape[-1])

    def draw() -> Tensor:  # N numbers in [-1, 1)
        return uniform_like(images[:, 0, 0, 0], generator, group)

    if config.rotation or config.translation or config.flip or config.crop < 1:
        angle = draw() * math.radians(config.rotation)
        shift = torch.stack([draw(), draw()], dim=1) * 2 * config.translation  # grid units: the picture spans 2
        mirror = torch.where(draw() < 0, -1.0, 1.0) if config.flip else torch.ones(n, device=images.device)
        box = _crops(draw, config.crop, images.shape[-2], images.shape[-1]) if config.crop < 1 else None
        images = _affine(images, angle, shift, mirror, size=size, box=box, expand=config.expand)
    else:
        images = centre_crop(images, size)
    if config.pad:
        images = _shifted(images, (draw(), draw()), config.pad)
    if config.brightness:
        images = images * (1 + config.brightness * draw()).reshape(n, 1, 1, 1)
    if config.contrast:
        images = _contrast(images.clamp(0, 1), 1 + config.contrast * draw())
    images = images.clamp(0, 1)
    return _cutout(images, (draw(), draw()), config.cutout) if config.cutout else images


def _shifted(images: Tensor, draws: tuple[Tensor, Tensor], most: int) -> Tensor:
    """Shift each image N×C×H×W by whole pixels, at most `most` either way; draws of N numbers in [-1, 1) decide."""
    height, width = images.shape[-2:]
    rows, columns = (((draw + 1) / 2 * (2 * most + 1)).long().clamp(max=2 * most) for draw in draws)
    padded = F.pad(images, (most, most, most, most))
    across = torch.arange(width, device=images.device) + columns[:, None]  # N W
    down = torch.arange(height, device=images.device) + rows[:, None]  # N H
    n = torch.arange(len(images), device=images.device)
    moved = padded.permute(0, 2, 3, 1)[n[:, None, None], down[:, :, None], across[:, None, :]]  # N H W C
    return moved.permute(0, 3, 1, 2)


def _cutout(images: Tensor, draws: tuple[Tensor, Tensor], side: float) -> Tensor:
    """Set a rectangle of each image to 0: `side` of height and width, around a random pixel, cut at the border."""

    def inside(draw: Tensor, length: int) -> Tensor:  # N length
        centre = (draw + 1) / 2 * length
        return (torch.arange(length, device=images.device) + 0.5 - centre[:, None]).abs() < side * length / 2

    height, width = images.shape[-2:]
    cut = inside(draws[0], height)[:, :, None] & inside(draws[1], width)[:, None, :]
    return images.masked_fill(cut[:, None], 0.0)


def _crops(draw: Callable[[], Tensor], smallest: float, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Draw a crop for each image; return extents and centres, N×2 (x, y) in grid units.

    As in torchvision, area and logarithm of the aspect ratio are uniform among the crops that fit; if none of
    `ATTEMPTS` fits, an image is cropped to the nearest aspect ratio.
    """
    low, high = math.log(ASPECTS[0]), math.log(ASPECTS[1])
    area = torch.stack([draw() for _ in range(ATTEMPTS)]).add(1).mul((1 - smallest) / 2).add(smallest)
    aspect = torch.stack([draw() for _ in range(ATTEMPTS)]).add(1).mul((high - low) / 2).add(low).exp()
    area = area * height * width
    sides = torch.stack([(area * aspect).sqrt() / width, (area / aspect).sqrt() / height], dim=2)  # attempts N 2
    fits = (sides <= 1).all(dim=2)
    first = fits.int().argmax(dim=0)
    chosen = sides[first, torch.arange(sides.shape[1], device=sides.device)]
    uncut = [min(1.0, height * ASPECTS[1] / width), min(1.0, width / ASPECTS[0] / height)]
    extent = torch.where(fits.any(dim=0)[:, None], chosen, chosen.new_tensor(uncut))
    return extent, torch.stack([draw(), draw()], dim=1) * (1 - extent)


def _affine(
    images: Tensor, angle: Tensor, shift: Tensor, mirror: Tensor, *, size: tuple[int, int] | None = None,
    box: tuple[Tensor, Tensor] | None = None, expand: bool = False,
) -> Tensor:  # fmt: skip
    """Rotate by `angle` in radians, mirror where `mirror` is -1, shift by grid units (N×2).

    The transform applies to the crop `box` (extents and centres); with `expand` the rotated image is shrunk until it
    fits. The result is the centre crop to `size`.
    """
    height, width = images.shape[-2:]
    size = size or (height, width)
    aspect = height / width  # the grid is square; rotate in pixels
    cos, sin = angle.cos(), angle.sin()
    zoom_x = cos.abs() + aspect * sin.abs() if expand else 1.0  # frame of the rotated image in units of the image
    zoom_y = cos.abs() + sin.abs() / aspect if expand else 1.0
    seen_x, seen_y = zoom_x * (size[1] / width), zoom_y * (size[0] / height)
    # After an odd margin, the centre of the crop lies half a pixel beside the image's.
    offset_x = zoom_x * ((2 * crop_margin(width, size[1]) + size[1] - width) / width)
    offset_y = zoom_y * ((2 * crop_margin(height, size[0]) + size[0] - height) / height)
    rows = [[mirror * cos, -sin * aspect, shift[:, 0]], [mirror * sin / aspect, cos, shift[:, 1]]]
    rows = [[x * seen_x, y * seen_y, by + x * offset_x + y * offset_y] for x, y, by in rows]
    if box is not None:
        rows = [[x * e, y * e, by * e + c] for (x, y, by), e, c in zip(rows, box[0].T, box[1].T, strict=True)]
    theta = torch.stack([v for row in rows for v in row], dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, [*images.shape[:2], *size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale each image's differences from the mean of its grey image by its factor."""
    grey = images
    if images.shape[1] == len(LUMA):
        grey = (images * images.new_tensor(LUMA).reshape(1, -1, 1, 1)).sum(dim=1, keepdim=True)
    mean = grey.mean(dim=(1, 2, 3), keepdim=True)
    return mean + factor.reshape(-1, 1, 1, 1) * (images - mean)


def uniform_like(images: Tensor, generator: torch.Generator, group: ProcessGroup = SINGLE_PROCESS) -> Tensor:
    """Draw uniform numbers in [-1, 1), shaped like `images`, from a generator on any device.

    Every rank draws for the batch of all ranks, so that an image gets the same numbers as in a single process.
    """
    shape = (group.world_size * len(images), *images.shape[1:])
    draws = torch.rand(shape, generator=generator, device=generator.device, dtype=images.dtype)
    return draws[group.batch_shard].to(images.device).mul_(2).sub_(1)


def add_uniform_noise(
    images: Tensor, eps: float, generator: torch.Generator, unit: Tensor | float = 1.0,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Tensor:  # fmt: skip
    """Return `images` plus uniform noise of half-width `eps`.

    Args:
        images: N×C×H×W in [0, 1].
        eps: half-width, in units of `unit`; 0 returns the images themselves.
        generator: source of the noise.
        unit: pixels of [0, 1], or 1×C×1×1 standard deviations of normalised images.
        group: the ranks that share the batch, of which `images` are this rank's part.

    Returns:
        Noisy images, not clipped: clipping would make the noise at black and white pixels one-sided.
    """
    return images + eps * unit * uniform_like(images, generator, group) if eps > 0 else images


def as_seen(images: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Convert stored images N×C0×H0×W0 uint8 to the network's N×C×H×W float32 in [0, 1]; repeat grey channels."""
    seen = centre_crop(images, size).float().div_(255)
    return seen if seen.shape[1] == channels else seen.repeat(1, channels, 1, 1)


def centre_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the centre crop N×C×H×W of images N×C×H0×W0."""
    height, width = size
    top, left = crop_margin(images.shape[-2], height), crop_margin(images.shape[-1], width)
    return images[..., top : top + height, left : left + width]


def crop_margin(side: int, crop: int) -> int:
    """Return the pixels before a centre crop of a side, rounded as in torchvision."""
    return round((side - crop) / 2)
