"""Denoising layers: non-local means on feature maps.

Li et al., "Enhancing Intrinsic Adversarial Robustness via Feature Pyramid Decoder", CVPR 2020;
after Wang et al., "Non-local Neural Networks", CVPR 2018, and Xie et al., "Feature Denoising", CVPR 2019.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.config import Denoise
from robustfpd.errors import unknown_name
from robustfpd.models.ops.tracing import as_autocast, traced


def dot_product(x: Tensor, kept: float = 0.0) -> Tensor:
    """Non-local means with a dot-product affinity, (X Xᵀ) X / P, in the cheaper order.

    Args:
        x: N×C×H×W; P = H·W.
        kept: how often x itself is added.

    Returns:
        N×C×H×W. Position i holds the mean over j of (x_i · x_j) x_j.
    """
    rows = _rows(x)
    p, c = rows.shape[1:]
    if c > p:
        mixed = torch.bmm(torch.bmm(rows, rows.transpose(1, 2)) / p, rows)
    elif traced(x):
        mixed = torch.bmm(rows, torch.bmm(rows.transpose(1, 2), rows) / p)
    else:
        mixed = _ThroughGram.apply(rows, kept)[0]
        return _map(mixed, x)
    return _map(mixed + kept * rows if kept else mixed, x)


class _ThroughGram(torch.autograd.Function):
    """X ↦ X G + k·X with G = Xᵀ X / P, X in rows of C.

    Its gradient is D G + X (Xᵀ D + Dᵀ X) / P + k·D. Autograd does not know that G is symmetric: it takes one product
    more, and passes over the maps to add up what it finds.
    """

    @staticmethod
    def forward(rows: Tensor, kept: float) -> tuple[Tensor, Tensor]:
        gram = torch.bmm(rows.transpose(1, 2), rows) / rows.shape[1]
        mixed = torch.bmm(rows, gram)
        return (mixed.add_(rows, alpha=kept) if kept else mixed), gram

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        rows, ctx.kept = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(rows, output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rows, gram = ctx.saved_tensors
        above, p = gradients[0], rows.shape[1]
        if torch.is_grad_enabled():  # for second derivatives, which the gram matrix has a part in
            gram = torch.bmm(rows.transpose(1, 2), rows) / p
        half = torch.bmm(rows.transpose(1, 2), above) / p
        slope = torch.baddbmm(torch.bmm(above, gram), rows, half + half.transpose(1, 2))
        return (slope + ctx.kept * above if ctx.kept else slope), None


def softmax_affinity(x: Tensor, kept: float = 0.0) -> Tensor:
    """Non-local means with affinity softmax_j(x_i · x_j / √C).

    Args:
        x: N×C×H×W.
        kept: how often x itself is added.

    Returns:
        N×C×H×W. Position i holds a convex combination of all positions.
    """
    rows = _rows(x)
    mixed = F.scaled_dot_product_attention(rows, rows, rows)
    return _map(mixed + kept * rows if kept else mixed, x)


def gaussian_affinity(x: Tensor, kept: float = 0.0) -> Tensor:
    """Non-local means with normalised affinity exp(-|x_i - x_j|² / 2C) (Buades et al., CVPR 2005).

    Args:
        x: N×C×H×W; the bandwidth √C makes the affinity independent of the width.
        kept: how often x itself is added.

    Returns:
        N×C×H×W. Position i holds a convex combination of all positions.
    """
    rows = _rows(x)
    # |x_i|² is constant in j and drops out of the softmax; -|x_j|²/2 rides along as one more channel.
    half_square = -rows.square().sum(dim=2, keepdim=True) / 2
    query = torch.cat([rows, torch.ones_like(half_square)], dim=2)
    key = torch.cat([rows, half_square], dim=2)
    mixed = F.scaled_dot_product_attention(query, key, rows, scale=1 / x.shape[1])
    return _map(mixed + kept * rows if kept else mixed, x)


def _rows(x: Tensor) -> Tensor:
    """N×C×H×W as N×P×C: a view, whatever the layout of the map."""
    return as_autocast(x).flatten(2).transpose(1, 2)


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """N×P×C as a map with the shape of `like`, in channels_last, where the layers that follow are quickest."""
    n, c, h, w = like.shape
    return rows.reshape(n, h, w, c).permute(0, 3, 1, 2)


class Affinity(Protocol):
    """Non-local means of a map."""

    __name__: str

    def __call__(self, x: Tensor, kept: float = 0.0) -> Tensor:
        """Map N×C×H×W to the means of all positions, plus `kept` times x."""


class NonLocal(nn.Module):
    """x + affinity(x): a denoising layer without parameters."""

    def __init__(self, affinity: Affinity) -> None:
        super().__init__()
        self.affinity = affinity

    def forward(self, x: Tensor) -> Tensor:
        """Map N×C×H×W to N×C×H×W."""
        return self.affinity(x, kept=1.0)

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


_AFFINITIES: dict[str, Affinity] = {
    "dot": dot_product,
    "softmax": softmax_affinity,
    "gaussian": gaussian_affinity,
}


def affinity(kind: Denoise) -> Affinity:
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
