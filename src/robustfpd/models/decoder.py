"""FPD_R, the image restoration: a feature pyramid, then transposed convolutions.

Li et al., CVPR 2020, figure 2; the pyramid after Lin et al., "Feature Pyramid Networks", CVPR 2017.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from robustfpd.errors import InputError
from robustfpd.models.ops.fused_decoder import run_fused


class RestorationDecoder(nn.Module):
    """Restore an image from feature maps: c2…c5 → p5…p2 → x′.

    Args:
        channels: channels of c2…c5, finest first; one to four maps.
        reduction: side of the image over the side of the finest map, rounded.
        width: channels of the pyramid.
        out_channels: channels of the image.
        start_at_zero: initialise the last layer to 0, so that the output is 0.
        unstrided_kernel: kernel of the transposed convolutions that keep the size, 3, or 2 as in the published ResNeXt;
            None leaves them out.

    Raises:
        InputError: `unstrided_kernel=2` where only one layer keeps the size.
    """

    def __init__(
        self, channels: Sequence[int], reduction: int, width: int, out_channels: int, *,
        unstrided_kernel: int | None = 3, start_at_zero: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, width, kernel_size=1) for c in channels)
        self.smooth = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.upscale = nn.Sequential(*_transposed_convolutions(reduction, width, out_channels, unstrided_kernel))
        if start_at_zero:
            for p in self.upscale[-1].parameters():
                nn.init.zeros_(p)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Restore images of `size` (height, width) from c2…c5, each N×C_i×H_i×W_i.

        Returns:
            x′, N×out_channels×H×W, not clamped: near [0, 1] once trained.
        """
        p2 = self.pyramid(features)
        restored = run_fused([self.smooth, *self.upscale], p2)  # self.upscale(self.smooth(p2))
        return restored if restored.shape[-2:] == size else _resize(restored, size)  # odd sides: strides round

    def pyramid(self, features: Sequence[Tensor]) -> Tensor:
        """Return p2 of c2…c5, N×width×H_2×W_2; with fewer maps, the last level there is."""
        levels = len(self.laterals)
        assert len(features) == levels
        # Of fewer than four maps the finest fills the places of those that are missing; it is not read there.
        c2, c3, c4, c5 = [features[0]] * (4 - levels) + list(features)
        lateral2, lateral3, lateral4, lateral5 = [self.laterals[0]] * (4 - levels) + list(self.laterals)

        p5: Tensor = lateral5(c5)
        p4 = _resize(p5, c4.shape[-2:]) + lateral4(c4) if levels > 1 else p5
        p3 = _resize(p4, c3.shape[-2:]) + lateral3(c3) if levels > 2 else p4
        p2 = _resize(p3, c2.shape[-2:]) + lateral2(c2) if levels > 3 else p3
        return p2  # noqa: RET504


def _resize(p: Tensor, size: Sequence[int]) -> Tensor:
    """Resize N×C×H×W to a height and width, bilinearly."""
    return F.interpolate(p, size=tuple(size), mode="bilinear", align_corners=False)


def _transposed_convolutions(
    reduction: int, width: int, out_channels: int, unstrided_kernel: int | None
) -> list[nn.Module]:
    """Return the transposed convolutions width → 64 → 16 → out_channels that enlarge a map `reduction` times.

    Published ResNets have reduction 4: two layers that double the side, then a 1×1. For a smaller reduction, layers of
    stride 1 replace the last doublings, unless `unstrided_kernel` is None; for a larger one, doublings 16 → 16 are
    added. Published ResNeXts have reduction 1 and two 2×2 layers of stride 1: the first shrinks each side by a pixel,
    the second enlarges it again.
    """
    doublings = max(0, (max(reduction, 1) - 1).bit_length())
    count = doublings if unstrided_kernel is None else max(2, doublings)
    widths = [width, min(64, width), *[min(16, width)] * count][: count + 1]
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
