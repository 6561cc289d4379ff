"""Denoising layers: non-local means on feature maps.

Li et al., "Enhancing Intrinsic Adversarial Robustness via Feature Pyramid Decoder", CVPR 2020, after Wang et al.,
"Non-local Neural Networks", CVPR 2018, and Xie et al., "Feature Denoising", CVPR 2019.

Here are the formulas. `robustfpd.models.ops.non_local` computes the same faster.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from robustfpd.config import Denoise
from robustfpd.errors import unknown_name
from robustfpd.models.ops import Means, computed_by, non_local


@computed_by(non_local.dot_product)
def dot_product(x: Tensor, *, residual: bool = False) -> Tensor:
    """Return non-local means with a dot-product affinity, `(X Xᵀ) X / P`: the paper's denoising.

    Position i gets the mean over all positions j of (x_i · x_j) x_j. The means are cubic in `x` and can overflow.

    Args:
        x: feature maps or images, N×C×H×W; P = H·W.
        residual: add `x`.

    Returns:
        N×C×H×W.
    """
    X = x.flatten(2)  # N C P
    means = (X @ X.mT) @ X / X.shape[2]  # N C P
    return _with_residual(means, x, residual)


@computed_by(non_local.normalised)
def normalised(x: Tensor, *, residual: bool = False) -> Tensor:
    """Return dot-product means divided by the norm of their affinity, `(X Xᵀ) X / |X Xᵀ|`, the Frobenius norm.

    Linear in the scale of `x`: the singular values of the affinity are at most 1, so the means do not exceed `x` in L2.
    Args and return value are those of `dot_product`.
    """
    X = x.flatten(2)  # N C P
    affinity = X @ X.mT  # N C C
    norm = affinity.flatten(1).square().sum(dim=1).clamp_min(non_local.NORM_FLOOR).sqrt()  # N
    return _with_residual(affinity @ X / norm[:, None, None], x, residual)


@computed_by(non_local.softmax)
def softmax(x: Tensor, *, residual: bool = False) -> Tensor:
    """Return non-local means with affinity `softmax_j(x_i · x_j / √C)`; each is a convex combination of positions.

    Args and return value are those of `dot_product`.
    """
    X = x.flatten(2)  # N C P
    affinity = torch.softmax(X.mT @ X / math.sqrt(X.shape[1]), dim=2)  # N P P: position i, position j
    return _with_residual(X @ affinity.mT, x, residual)


@computed_by(non_local.gaussian)
def gaussian(x: Tensor, *, residual: bool = False) -> Tensor:
    """Return non-local means with affinity `exp(-|x_i - x_j|² / 2C)`, normalised over j (Buades et al., CVPR 2005).

    The bandwidth √C makes the affinity independent of the width. Args and return value are those of `dot_product`.
    """
    X = x.flatten(2)  # N C P
    squares = X.square().sum(dim=1)  # N P
    distances = squares[:, :, None] + squares[:, None, :] - 2 * X.mT @ X  # N P P: |x_i - x_j|²
    affinity = torch.softmax(-distances / (2 * X.shape[1]), dim=2)
    return _with_residual(X @ affinity.mT, x, residual)


def _with_residual(means: Tensor, x: Tensor, residual: bool) -> Tensor:
    """Return means N×C×P as N×C×H×W, plus `x` where `residual`."""
    means = means.reshape(x.shape)
    return x + means if residual else means


class NonLocal(nn.Module):
    """Denoising layer `x + g means(x)`: `x + (X Xᵀ) X / P` for the dot product without a gate.

    Args:
        means: the non-local means.
        gate: multiply the means by a learned number that is 0 at initialisation (ReZero; Bachlechner et al., UAI 2021).
    """

    def __init__(self, means: Means, gate: bool = False) -> None:
        super().__init__()
        self.means = means
        self.gate = nn.Parameter(torch.zeros(())) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        """Denoise N×C×H×W."""
        return self.means(x, residual=True) if self.gate is None else x + self.gate * self.means(x)

    def extra_repr(self) -> str:
        """Return the name of the means."""
        return self.means.__name__


class Bottleneck(nn.Module):
    """Denoising layer `x + g W means(x)` with a learned 1×1 convolution W (Xie et al., CVPR 2019).

    The means are the dot product's, (X Xᵀ) X / P, without a gate, and the normalised ones with a gate.

    Args:
        channels: channels of the maps.
        gate: as for `NonLocal`.
    """

    def __init__(self, channels: int, gate: bool = False) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, channels, kernel_size=1)
        self.gate = nn.Parameter(torch.zeros(())) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        """Denoise N×C×H×W."""
        means: Tensor = self.project(non_local_means("bottleneck", gate=self.gate is not None)(x))
        return x + (means if self.gate is None else self.gate * means)


_MEANS: dict[str, Means] = {"dot": dot_product, "normalised": normalised, "softmax": softmax, "gaussian": gaussian}


def non_local_means(kind: Denoise, *, gate: bool = False) -> Means:
    """Return the means of a kind of denoising. For `bottleneck` and `none`: `normalised` with a gate, else `dot`."""
    return _MEANS.get(kind, normalised if gate else dot_product)


def denoising_layer(kind: Denoise, channels: int, *, gate: bool = False) -> nn.Module | None:
    """Return a denoising layer for maps of `channels` channels, or None for `none`; `gate` as for `NonLocal`."""
    if kind == "none":
        return None
    if kind == "bottleneck":
        return Bottleneck(channels, gate)
    if kind not in _MEANS:
        raise unknown_name("denoise", kind, [*_MEANS, "bottleneck", "none"])
    return NonLocal(_MEANS[kind], gate)
