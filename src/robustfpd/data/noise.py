"""Training noise: x + U(-eps, eps) (Li et al., CVPR 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from robustfpd.processes import ALONE, Processes


def uniform_like(images: Tensor, generator: torch.Generator, among: Processes = ALONE) -> Tensor:
    """Draw uniform numbers in [-1, 1), shaped like `images`, from a generator on any device.

    Every one of several processes draws for all of the batch, so that its own images get what they would get alone.
    """
    shape = (among.size * len(images), *images.shape[1:])
    draws = torch.rand(shape, generator=generator, device=generator.device, dtype=images.dtype)
    return draws[among.own].to(images.device).mul_(2).sub_(1)


def add_uniform_noise(
    images: Tensor, eps: float, generator: torch.Generator, unit: Tensor | float = 1.0,
    among: Processes = ALONE,
) -> Tensor:  # fmt: skip
    """Return `images` plus uniform noise of half-width `eps`.

    Args:
        images: N×C×H×W in [0, 1].
        eps: half-width, in units of `unit`; 0 returns the images themselves.
        generator: source of the noise.
        unit: pixels of [0, 1], or 1×C×1×1 standard deviations of normalised images.
        among: the processes that share the batch, of which `images` are this one's own.

    Returns:
        Noisy images, not clipped: clipping would make noise at black and white pixels one-sided.
    """
    return images + eps * unit * uniform_like(images, generator, among) if eps > 0 else images
