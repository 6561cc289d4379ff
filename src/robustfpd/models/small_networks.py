"""Small networks for small images and for CPUs."""

from __future__ import annotations

import torch.nn.functional as F
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

CONV_STAGES = ("stem", "stage1", "stage2", "stage3")
MAP = 7
"""Height and width of the maps before the linear layers of `conv_mini`, to which others are pooled."""


def resnet_mini(in_channels: int, num_classes: int = 0, width: int = 16) -> nn.Module:
    """Return timm's ResNet with one basic block per stage, of `width`, 2, 4 and 8 times `width` channels."""
    return ResNet(BasicBlock, (1, 1, 1, 1),  # type: ignore[arg-type]
                  num_classes=num_classes, in_chans=in_channels, stem_type="deep", stem_width=width // 2,
                  channels=(width, 2 * width, 4 * width, 8 * width))  # fmt: skip


class ConvMini(nn.Module):
    """A plain convolutional network for images of about 28×28 pixels, with batch norm and two linear layers.

    The stem is a 1×1 convolution, which can threshold single pixels, and a strided 5×5 convolution, which halves the
    image. The maps are flattened, not pooled to one position, so the linear layers keep spatial positions.

    Shapes: images N×C×H×W → logits N×K, or features N×128 without `num_classes`.

    Args:
        in_channels: channels C of an image.
        num_classes: number of classes K; 0 for features.
        width: channels of the stem; the stages have 2, 4 and 4 times as many.
    """

    def __init__(self, in_channels: int, num_classes: int = 0, width: int = 32) -> None:
        super().__init__()
        pixels = _convolution(in_channels, width // 4, kernel=1)
        self.stem = nn.Sequential(*pixels, *_convolution(width // 4, width, kernel=5, stride=2))  # 28×28 → 14×14
        self.stage1 = _convolution(width, 2 * width)
        self.stage2 = _convolution(2 * width, 4 * width, stride=2)  # 7×7
        self.stage3 = _convolution(4 * width, 4 * width)
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(MAP**2 * 4 * width, 128), nn.ReLU(inplace=True))
        self.fc = nn.Linear(128, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits or features."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        if x.shape[-2:] != (MAP, MAP):  # pooling 7×7 to 7×7 takes a fifth of the time of an attack
            x = F.adaptive_avg_pool2d(x, MAP)
        out: Tensor = self.fc(self.hidden(x))
        return out


def _convolution(before: int, after: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(inplace=True),
    )
