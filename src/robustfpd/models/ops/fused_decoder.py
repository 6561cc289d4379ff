"""Linear layers in a row as one convolution: the same function of the same parameters in fewer multiplications.

No nonlinearity separates the decoder's last layers, so their product is a convolution too. Its weights are computed
from theirs in every forward pass, which costs as much as a few positions of one image; gradients flow through that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.models.ops import without_autocast

Layer = nn.Conv2d | nn.ConvTranspose2d


@dataclass(frozen=True)
class FusedLayers:
    """A chain of layers of which `first` and `patches` run as one convolution."""

    before: tuple[Layer, ...]
    """Run unchanged."""
    first: Layer
    """A convolution of stride 1, or a transposed one."""
    patches: tuple[nn.ConvTranspose2d, ...]
    """Follow it; each turns a position into a patch that no other position contributes to."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map N×C×H×W as the layers one after another do, up to rounding."""
        for layer in self.before:
            x = layer(x)
        with without_autocast(x):  # products of weights in full precision
            weight, bias, side = self._weights()
        kernel, padding = self.first.kernel_size[0], int(self.first.padding[0])
        if isinstance(self.first, nn.ConvTranspose2d):
            padding = kernel - 1 - padding
        return F.pixel_shuffle(F.conv2d(x, weight, bias, padding=padding), side)

    def _weights(self) -> tuple[Tensor, Tensor, int]:
        """Return weight (D·s·s)×C×k×k and bias of the convolution whose channels are the patches' pixels, and s."""
        matrix, offset, side = _one_patch(self.patches)  # M×(D s s), D s s
        kernel = self.first.weight
        if isinstance(self.first, nn.ConvTranspose2d):  # of stride 1: a convolution by the flipped kernel
            kernel = kernel.transpose(0, 1).flip(2, 3)
        weight = (matrix.T @ kernel.flatten(1)).reshape(-1, *kernel.shape[1:])
        assert self.first.bias is not None
        return weight, matrix.T @ self.first.bias + offset, side


def run_fused(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Apply (transposed) convolutions to x, N×C×H×W, in turn, fused where that takes fewer multiplications."""
    chain = [layer for layer in layers if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(chain) == len(layers)
    fused = fuse(chain)
    if fused is not None:
        return fused(x)
    for layer in chain:
        x = layer(x)
    return x


def fuse(layers: Sequence[Layer]) -> FusedLayers | None:
    """Return a chain fused, or None where that takes no fewer multiplications."""
    start = len(layers)
    while start > 0 and _makes_patches(layers[start - 1]):
        start -= 1
    if start in (0, len(layers)):
        return None
    first, patches = layers[start - 1], tuple(p for p in layers[start:] if isinstance(p, nn.ConvTranspose2d))
    if first.stride != (1, 1) or first.groups != 1:
        return None
    side, unfused = 1, first.weight.numel()
    for patch in patches:
        unfused += side * side * patch.weight.numel()  # a position has become side² positions here
        side *= patch.kernel_size[0]
    area = first.kernel_size[0] * first.kernel_size[1]
    if first.in_channels * area * patches[-1].out_channels * side * side >= unfused:
        return None
    return FusedLayers(tuple(layers[: start - 1]), first, patches)


def _makes_patches(layer: Layer) -> bool:
    plain = layer.groups == 1 and layer.padding == (0, 0) and layer.kernel_size == layer.stride
    return isinstance(layer, nn.ConvTranspose2d) and plain and layer.bias is not None


def _one_patch(patches: Sequence[nn.ConvTranspose2d]) -> tuple[Tensor, Tensor, int]:
    """Return transposed convolutions without overlap as one: weight M×(D·s·s), bias D·s·s, side s of the patch."""
    first = patches[0]
    assert first.bias is not None
    weight, side = first.weight, first.kernel_size[0]  # M D s s
    bias = first.bias.reshape(-1, 1, 1).expand(-1, side, side)  # D s s
    for layer in patches[1:]:
        k, out = layer.kernel_size[0], layer.out_channels
        weight = torch.einsum("mdyx,doab->moyaxb", weight, layer.weight).reshape(-1, out, side * k, side * k)
        bias = torch.einsum("dyx,doab->oyaxb", bias, layer.weight).reshape(out, side * k, side * k)
        side *= k
        assert layer.bias is not None
        bias = bias + layer.bias.reshape(-1, 1, 1)
    return weight.flatten(1), bias.flatten(), side
