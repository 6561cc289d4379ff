"""Denoising layers: non-local means on feature maps.

Li et al., "Enhancing Intrinsic Adversarial Robustness via Feature Pyramid Decoder", CVPR 2020;
after Wang et al., "Non-local Neural Networks", CVPR 2018, and Xie et al., "Feature Denoising", CVPR 2019.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.config import Denoise
from robustfpd.errors import unknown_name


def dot_product(x: Tensor) -> Tensor:
    """Non-local means with a dot-product affinity, (X Xᵀ) X / P, in the cheaper order.

    Args:
        x: N×C×H×W; P = H·W.

    Returns:
        N×C×H×W. Position i holds the mean over j of (x_i · x_j) x_j.
    """
    n, c, h, w = x.shape
    flat = x.reshape(n, c, h * w)  # N C P
    if c <= h * w:
        mixed = torch.bmm(torch.bmm(flat, flat.transpose(1, 2)) / (h * w), flat)
    else:
        mixed = torch.bmm(flat, torch.bmm(flat.transpose(1, 2), flat) / (h * w))
    return mixed.reshape(n, c, h, w)


def softmax_affinity(x: Tensor) -> Tensor:
    """Non-local means with affinity softmax_j(x_i · x_j / √C).

    Args:
        x: N×C×H×W.

    Returns:
        N×C×H×W. Position i holds a convex combination of all positions.
    """
    n, c, h, w = x.shape
    rows = x.reshape(n, c, h * w).transpose(1, 2)  # N P C
    mixed = F.scaled_dot_product_attention(rows, rows, rows)
    return mixed.transpose(1, 2).reshape(n, c, h, w)


def gaussian_affinity(x: Tensor) -> Tensor:
    """Non-local means with normalised affinity exp(-|x_i - x_j|² / 2C) (Buades et al., CVPR 2005).

    Args:
        x: N×C×H×W; the bandwidth √C makes the affinity independent of the width.

    Returns:
        N×C×H×W. Position i holds a convex combination of all positions.
    """
    n, c, h, w = x.shape
    rows = x.reshape(n, c, h * w).transpose(1, 2)  # N P C
    # |x_i|² is constant in j and drops out of the softmax; -|x_j|²/2 rides along as one more channel.
    half_square = -rows.square().sum(dim=2, keepdim=True) / 2
    query = torch.cat([rows, torch.ones_like(half_square)], dim=2)
    key = torch.cat([rows, half_square], dim=2)
    mixed = F.scaled_dot_product_attention(query, key, rows, scale=1 / c)
    return mixed.transpose(1, 2).reshape(n, c, h, w)


class NonLocal(nn.Module):
    """x + affinity(x): a denoising layer without parameters."""

    def __init__(self, affinity: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.affinity = affinity

    def forward(self, x: Tensor) -> Tensor:
        """Map N×C×H×W to N×C×H×W."""
        return x + self.affinity(x)

    def extra_repr(self) -> str:
        """Name the affinity."""
        return self.affinity.__name__


class Bottleneck(nn.Module):
    """x + W (X Xᵀ) X / P with a learned 1×1 convolution W (Xie et al., CVPR 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map N×C×H×W to N×C×H×W."""
        out: Tensor = x + self.project(dot_product(x))
        return out


_AFFINITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "dot": dot_product,
    "softmax": softmax_affinity,
    "gaussian": gaussian_affinity,
}


def affinity(kind: Denoise) -> Callable[[Tensor], Tensor]:
    """Return the affinity of a kind; dot-product for kinds that are not named after one."""
    return _AFFINITIES.get(kind, dot_product)


def denoising_layer(kind: Denoise, channels: int) -> nn.Module | None:
    """Return a denoising layer for maps with `channels` channels, or None for `none`.

    Raises:
        InputError: `kind` is unknown.
    """
    if kind == "none":
        return None
    if kind == "bottleneck":
        return Bottleneck(channels)
    if kind not in _AFFINITIES:
        raise unknown_name("denoise", kind, [*_AFFINITIES, "bottleneck", "none"])
    return NonLocal(_AFFINITIES[kind])
