"""Augmentation in batches, on the images' device, each image with its own draw."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from robustfpd.config import AugmentConfig


def augment(images: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Rotate, shift, mirror and brighten images at random.

    Args:
        images: N×C×H×W in [0, 1].
        config: how much of each.
        generator: source of the draws.

    Returns:
        N×C×H×W in [0, 1]; where a picture moves in from outside, black.
    """
    n = len(images)

    def draw() -> Tensor:  # N numbers in [-1, 1)
        return torch.rand(n, generator=generator, device=generator.device).to(images.device).mul(2).sub(1)

    if config.rotation or config.translation or config.flip:
        angle = draw() * math.radians(config.rotation)
        shift = torch.stack([draw(), draw()], dim=1) * 2 * config.translation  # grid units: the picture spans 2
        mirror = torch.where(draw() < 0, -1.0, 1.0) if config.flip else torch.ones(n, device=images.device)
        images = _affine(images, angle, shift, mirror)
    if config.brightness:
        images = images * (1 + config.brightness * draw()).reshape(n, 1, 1, 1)
    return images.clamp(0, 1)


def _affine(images: Tensor, angle: Tensor, shift: Tensor, mirror: Tensor) -> Tensor:
    """Rotate by `angle` in radians, mirror where `mirror` is -1, shift by grid units (N×2)."""
    height, width = images.shape[-2:]
    aspect = height / width  # the grid is square; rotate in pixels
    cos, sin = angle.cos(), angle.sin()
    rows = [mirror * cos, -sin * aspect, shift[:, 0], mirror * sin / aspect, cos, shift[:, 1]]
    theta = torch.stack(rows, dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
