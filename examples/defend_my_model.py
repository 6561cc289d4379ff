"""Wrap your own network in a Feature Pyramid Decoder, train it in two phases, and evaluate it.

python examples/defend_my_model.py OUT_FOLDER
"""

import sys
from pathlib import Path

from torch import Tensor, nn

import robustfpd as rf


def block(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return convolution, batch norm and ReLU."""
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


class Net(nn.Module):
    """A plain classifier; it needs no code of robustfpd."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage1, self.stage2 = block(1, 16, 1), block(16, 32, 2), block(32, 64, 2)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images N×1×H×W to logits N×10."""
        features = self.stage2(self.stage1(self.stem(images)))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/defend-my-model")
config = rf.recipe("digits/mini", ["model.backbone=custom", "model.stages=[stem,stage1,stage2]", "training.epochs=2"])
result = rf.train(config, out, net=Net(), device="cpu")
images, labels = rf.data.load(config.data).test.floats()
record = rf.evaluate(
    result.model, (images, labels), suite="first-look", eps=0.1, num_images=64, out_dir=out / "evaluation"
)
print(f"clean accuracy {record.clean}, robust accuracy at eps 0.1 {record.worst_case[-1].robust}")
print(f"next: robustfpd report {out}")
