"""Training noise: x + U(-eps, eps) (Li et al., CVPR 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from robustfpd.distributed import SINGLE_PROCESS, ProcessGroup


def uniform_like(images: Tensor, generator: torch.Generator, group: ProcessGroup = SINGLE_PROCESS) -> Tensor:
    """Draw uniform numbers in [-1, 1), shaped like `images`, from a generator on any device.

    Each of several ranks draws for the whole batch, so that an image gets the same numbers as in one process.
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
        Noisy images, not clipped: clipping would make noise at black and white pixels one-sided.
    """
    return images + eps * unit * uniform_like(images, generator, group) if eps > 0 else images
