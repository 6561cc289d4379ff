"""Networks with published robust or certified accuracies, and the images to attack them on.

The four MNIST and Fashion-MNIST networks and the CIFAR-10 network are read from a folder of safetensors files; their
layers are those that their authors publish. Two more come with robustfpd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.datasets import MNIST, FashionMNIST, ImageFolder
from torchvision.transforms.functional import pil_to_tensor

import robustfpd as rf
from robustfpd.evaluation.loaders import draw_images

MNIST_STATISTICS = (0.1307,), (0.3081,)
CIFAR10_STATISTICS = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


@dataclass(frozen=True)
class ReferenceNetwork:
    """A network, its images and its radius in L∞."""

    dataset: str
    eps: float
    build: Callable[[], nn.Module] | None
    """None for a network of the zoo."""
    certified: float | None = None
    """Published certified accuracy at this radius, on all test images."""


class Normalized(nn.Sequential):
    """Normalization with mean and std, then the network."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.mean = nn.Buffer(torch.tensor(mean).view(1, -1, 1, 1), persistent=False)  # 1 C 1 1
        self.std = nn.Buffer(torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits N×K of images N×C×H×W in [0, 1]."""
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


class ResidualBlock(nn.Module):
    """conv, ReLU, conv, plus the shortcut, then ReLU."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride)) if stride > 1 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        """Return features N×width×H/stride×W/stride of N×C×H×W."""
        features: Tensor = (self.conv2(self.conv1(x).relu()) + self.shortcut(x)).relu()
        return features


class ResNet2B(nn.Module):
    """The CIFAR-10 network `resnet_2b` of alpha-beta-CROWN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer1 = nn.Sequential(ResidualBlock(8, 16, 2), ResidualBlock(16, 16, 1))
        self.linear1, self.linear2 = nn.Linear(1024, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits N×10 of normalized images N×3×32×32."""
        logits: Tensor = self.linear2(self.linear1(self.layer1(self.conv1(x).relu()).flatten(1)).relu())
        return logits


def _trades() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1024, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10),
    )  # fmt: skip


def _wong_kolter() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


def _colt() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, 2, 2), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(3136, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip


NETWORKS = {
    "wongkolter_fashion_mnist_eps0.1": ReferenceNetwork("fashion_mnist", 0.1, _wong_kolter, 0.655),
    "colt_mnist_eps0.1": ReferenceNetwork("mnist", 0.1, _colt, 0.971),
    "wongkolter_mnist_eps0.1": ReferenceNetwork("mnist", 0.1, _wong_kolter, 0.942),
    "trades_mnist_smallcnn": ReferenceNetwork("mnist", 0.3, _trades),
    "abcrown_cifar_resnet2b": ReferenceNetwork("cifar10", 2 / 255, ResNet2B),
    "mnist/mini-baseline-adversarial": ReferenceNetwork("mnist", 0.3, None),
    "mnist/mini-fpd-adversarial": ReferenceNetwork("mnist", 0.3, None),
}


def load_network(name: str, weights: Path) -> nn.Module:
    """Return a reference network as a classifier of images in [0, 1], in evaluation mode."""
    reference = NETWORKS[name]
    if reference.build is None:
        classifier: nn.Module = rf.load(name).classifier()
        return classifier.eval()
    network = reference.build()
    network.load_state_dict(load_file(weights / f"{name}.safetensors"))
    if name.startswith("colt"):
        network = Normalized(network, *MNIST_STATISTICS)
    elif reference.dataset == "cifar10":
        network = Normalized(network, *CIFAR10_STATISTICS)
    return network.eval()


def load_images(dataset: str, data_root: Path, count: int) -> tuple[Tensor, Tensor]:
    """Return the test images that `evaluate` with seed 0 draws, N×C×H×W in [0, 1], and their labels N."""
    if dataset == "cifar10":
        folder = ImageFolder(str(data_root / "cifar10_png" / "test"))
        chosen = draw_images(len(folder), count, seed=0)
        pairs = [folder[int(i)] for i in chosen]
        images = torch.stack([pil_to_tensor(image) for image, _ in pairs])
        return images.float() / 255, torch.tensor([label for _, label in pairs])
    test = (MNIST if dataset == "mnist" else FashionMNIST)(str(data_root), train=False)
    chosen = draw_images(len(test), count, seed=0)
    return (test.data[chosen].float() / 255).unsqueeze(1), test.targets[chosen]
