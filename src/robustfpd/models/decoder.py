"""FPD_R: the image-restoration decoder, a feature pyramid followed by transposed convolutions.

Li et al., CVPR 2020; the pyramid after Lin et al., "Feature Pyramid Networks", CVPR 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.errors import InputError
from robustfpd.models.ops.fused_decoder import Layer, fold


class RestorationDecoder(nn.Module):
    """Feature maps c2…c5 → p5…p2 → an image of the input's own size."""

    def __init__(
        self, channels: Sequence[int], reduction: int, width: int, out_channels: int, *, unstrided_kernel: int = 3
    ) -> None:
        """Build the decoder.

        Args:
            channels: channels of the maps that the pyramid reads, finest first (c2…c5; one to four).
            reduction: input side over the finest map's side, rounded.
            width: channels P of the pyramid.
            out_channels: channels of the image.
            unstrided_kernel: kernel of the transposed convolutions that keep the size, 3 or (published ResNeXt) 2.

        Raises:
            InputError: a single kernel of 2 cannot keep the size.
        """
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, kernel_size=1) for c in channels)
        self.smooth = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.upscale = nn.Sequential(*_upscaling(reduction, width, out_channels, unstrided_kernel))

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Restore an image.

        Args:
            features: c2…c5, finest first, each N×C_i×H_i×W_i.
            size: height and width of the image.

        Returns:
            N×out_channels×H×W, not squashed: near [0, 1] once trained.
        """
        maps = [lateral(c) for lateral, c in zip(self.laterals, features, strict=True)]
        p = maps.pop()
        while maps:
            lateral = maps.pop()
            p = F.interpolate(p, size=lateral.shape[-2:], mode="bilinear", align_corners=False).add_(lateral)
        restored = self._upscaled(p)
        if restored.shape[-2:] != size:  # odd sides: strided stages round, transposed convolutions double
            restored = F.interpolate(restored, size=size, mode="bilinear", align_corners=False)
        return restored

    def _upscaled(self, p: Tensor) -> Tensor:
        """Smoothing and transposed convolutions, which are linear, as few convolutions as they make."""
        folded = fold([self.smooth, *self._transposed()])
        if folded is not None:
            return folded(p)
        restored: Tensor = self.upscale(self.smooth(p))
        return restored

    def _transposed(self) -> list[Layer]:
        return [layer for layer in self.upscale if isinstance(layer, nn.ConvTranspose2d)]


def _upscaling(reduction: int, width: int, out_channels: int, unstrided_kernel: int) -> list[nn.Module]:
    """Transposed convolutions P → 64 → 16 → C that double the side until `reduction` is undone.

    Published ResNets have reduction 4: two doublings and a 1×1. Where fewer doublings are needed a
    3×3 of stride 1 takes their place; where more are needed, 16 → 16 doublings follow. Published ResNeXts
    have reduction 1 and, instead of two 3×3, two 2×2, of which the first loses a row and the second gains it.
    """
    doublings = max(0, (max(reduction, 1) - 1).bit_length())
    widths = [width, min(64, width), min(16, width)] + [min(16, width)] * (doublings - 2)
    if unstrided_kernel == 2 and doublings == 1:
        raise InputError(
            f"unstrided_kernel=2 keeps the size in pairs only, and a reduction of {reduction} needs one such layer; "
            "take unstrided_kernel=3"
        )
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(widths)):
        if i < doublings:
            layers.append(nn.ConvTranspose2d(before, after, kernel_size=2, stride=2))
        elif unstrided_kernel == 2:
            layers.append(nn.ConvTranspose2d(before, after, kernel_size=2, padding=1 - i))
        else:
            layers.append(nn.ConvTranspose2d(before, after, kernel_size=3, padding=1))
    return [*layers, nn.ConvTranspose2d(widths[-1], out_channels, kernel_size=1)]
