"""Non-local means, fast: the formulas of `robustfpd.models.denoise` without P×P matrices in memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robustfpd.models.ops import as_autocast

NORM_FLOOR = 1e-24
"""Smallest squared norm of an affinity: the means of a map of zeros are zeros, and gradients stay within float32."""


def dot_product(x: Tensor, *, residual: bool = False) -> Tensor:
    """Compute `(X Xᵀ) X / P` in the cheaper order of multiplication, with a gradient of fewer products."""
    rows = _rows(x)
    p, c = rows.shape[1:]
    if c <= p:
        return _map(_GramProduct.apply(rows, residual)[0], x)
    means = torch.bmm(torch.bmm(rows, rows.transpose(1, 2)) / p, rows)
    return _map(means + rows if residual else means, x)


def normalised(x: Tensor, *, residual: bool = False) -> Tensor:
    """Compute `(X Xᵀ) X / |X Xᵀ|` as one product with a small matrix, which takes up the norm and the residual."""
    rows = _rows(x)
    p, c = rows.shape[1:]
    small = torch.bmm(rows.transpose(1, 2), rows) if c <= p else torch.bmm(rows, rows.transpose(1, 2))
    precise = small.to(torch.promote_types(small.dtype, torch.float32))
    squares = precise.square().sum(dim=(1, 2), keepdim=True)  # |Xᵀ X| = |X Xᵀ|
    small = small * squares.clamp_min(NORM_FLOOR).rsqrt().to(small.dtype)
    if residual:
        small = small + torch.eye(small.shape[1], dtype=small.dtype, device=small.device)
    return _map(torch.bmm(rows, small) if c <= p else torch.bmm(small, rows), x)


class _GramProduct(torch.autograd.Function):
    """Rows R (P×C) ↦ R G, or R G + R with `residual`, where G = Rᵀ R / P.

    With D the gradient of the output, that of R is D G + R (Rᵀ D + Dᵀ R) / P, plus D with `residual`. Autograd does
    not know that G is symmetric: it takes one product more and more passes over the maps to add the terms.
    """

    @staticmethod
    def forward(rows: Tensor, residual: bool) -> tuple[Tensor, Tensor]:
        gram = torch.bmm(rows.transpose(1, 2), rows) / rows.shape[1]
        means = torch.bmm(rows, gram)
        return (means.add_(rows) if residual else means), gram

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
        rows, ctx.residual = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(rows, output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        rows, gram = ctx.saved_tensors
        grad_out, p = gradients[0], rows.shape[1]
        if torch.is_grad_enabled():  # second derivatives: the Gram matrix depends on the rows
            gram = torch.bmm(rows.transpose(1, 2), rows) / p
        half = torch.bmm(rows.transpose(1, 2), grad_out) / p
        grad = torch.baddbmm(torch.bmm(grad_out, gram), rows, half + half.transpose(1, 2))
        return (grad + grad_out if ctx.residual else grad), None


def softmax(x: Tensor, *, residual: bool = False) -> Tensor:
    """Compute the means with affinity softmax_j(x_i · x_j / √C) by scaled dot-product attention."""
    rows = _rows(x)
    means = F.scaled_dot_product_attention(rows, rows, rows)
    return _map(means + rows if residual else means, x)


def gaussian(x: Tensor, *, residual: bool = False) -> Tensor:
    """Compute the means with affinity exp(-|x_i - x_j|² / 2C), normalised over j, as an attention."""
    rows = _rows(x)
    # |x_i|² is constant in j and cancels in the softmax; -|x_j|²/2 becomes one more channel.
    half_square = -rows.square().sum(dim=2, keepdim=True) / 2
    query = torch.cat([rows, torch.ones_like(half_square)], dim=2)
    key = torch.cat([rows, half_square], dim=2)
    means = F.scaled_dot_product_attention(query, key, rows, scale=1 / x.shape[1])
    return _map(means + rows if residual else means, x)


def _rows(x: Tensor) -> Tensor:
    """Return a map N×C×H×W as N×P×C, a view in both memory layouts."""
    return as_autocast(x).flatten(2).transpose(1, 2)


def _map(rows: Tensor, like: Tensor) -> Tensor:
    """Return N×P×C as a map of the shape of `like`, in channels_last, the layout that convolutions are fastest in."""
    n, c, h, w = like.shape
    return rows.reshape(n, h, w, c).permute(0, 3, 1, 2)
