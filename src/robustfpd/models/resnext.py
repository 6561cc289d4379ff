"""The published ResNeXt: 32×4d after Xie et al., CVPR 2017, with grouped first convolutions and a stem that keeps size.

It is a network of its own: torchvision's and timm's ResNeXt group the 3×3 convolutions alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

GROUPS = 32
GROUP_WIDTH = 4
"""Channels of a group in the first stage; doubled from stage to stage."""


class ResNeXt(nn.Module):
    """Images N×C×H×W → N×2048×H/8×W/8, by a 3×3 stem of stride 1 and four stages of strides 1, 2, 2, 2."""

    def __init__(self, blocks: Sequence[int], in_channels: int) -> None:
        """Build the stages `conv1` (the stem) to `conv5`; `blocks` counts those of `conv2` to `conv5`."""
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, 64, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)
        )
        self.conv2 = _stage(64, 64, blocks[0], stride=1)
        self.conv3 = _stage(256, 128, blocks[1], stride=2)
        self.conv4 = _stage(512, 256, blocks[2], stride=2)
        self.conv5 = _stage(1024, 512, blocks[3], stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to the last stage's features."""
        x = self.conv1(x)
        out: Tensor = self.conv5(self.conv4(self.conv3(self.conv2(x))))
        return out


class _Block(nn.Module):
    """Grouped 1×1, grouped 3×3 and dense 1×1 convolutions beside a shortcut."""

    def __init__(self, before: int, inner: int, after: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(before, inner, kernel_size=1, groups=GROUPS, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, kernel_size=3, stride=stride, padding=1, groups=GROUPS, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, after, kernel_size=1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(after)
            )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.residual(x) + self.shortcut(x))
        return out


def _stage(before: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """Blocks of one width; the first takes the stride. `width` is that of a ResNet: the output has four times it."""
    inner = GROUPS * (GROUP_WIDTH * width // 64)
    first = _Block(before, inner, 4 * width, stride)
    return nn.Sequential(first, *(_Block(4 * width, inner, 4 * width, 1) for _ in range(blocks - 1)))
