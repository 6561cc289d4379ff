"""Networks of different kinds whose gradients are right, to set the thresholds of the checks on.

Some are trained here in seconds to minutes, on scikit-learn's digits, MNIST or photographs of CALTECH-101; the others
are those of `reference_networks` and of the zoo.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from tests.evaluation import defences
from torch import Tensor, nn
from torchvision.datasets import MNIST, ImageFolder
from torchvision.transforms.functional import pil_to_tensor, resize

from benchmarks.reference_networks import NETWORKS, load_images, load_network
from robustfpd.attacks import pgd
from robustfpd.rng import generator

Data = tuple[Tensor, Tensor]
TRAINING_IMAGES = 4000  # of MNIST
PHOTOGRAPHS = ("Motorbikes", "airplanes", "Faces_easy", "watch", "Leopards", "bonsai")
SIDE = 64  # of the photographs
PER_CLASS = 110


@dataclass(frozen=True)
class HonestNetwork:
    """A network, the images to check it on and the radius, L∞."""

    kind: str
    dataset: str
    eps: float
    make: Callable[[Path, Path], nn.Module]
    """(folder of data sets, folder of weights) → classifier in evaluation mode."""


class Residual(nn.Module):
    """Two convolutions with batch normalization, plus the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features N×width×H×W of N×width×H×W."""
        added: Tensor = x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return added.relu()


def lenet(activation: Callable[[], nn.Module] = nn.ReLU, pool: type[nn.Module] = nn.MaxPool2d) -> nn.Module:
    """Return LeNet for 28×28 grey images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), activation(), pool(2), nn.Conv2d(16, 32, 5, padding=2), activation(), pool(2),
        nn.Flatten(), nn.Linear(32 * 49, 100), activation(), nn.Linear(100, 10),
    )  # fmt: skip


def residual_network() -> nn.Module:
    """Return a residual network with batch normalization for 28×28 grey images."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), Residual(16), Residual(16),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def train(network: nn.Module, data: Data, epochs: int, *, eps: float = 0.0, seed: int = 0) -> nn.Module:
    """Train by cross-entropy with Adam; under PGD whose radius grows up to `eps` over the first half."""
    images, labels = data
    draws = generator(seed, "honest networks")
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3 if len(images) > 1000 else 1e-3)
    for epoch in range(epochs):
        radius = eps * min(1.0, (epoch + 1) / (epochs / 2))
        for rows in torch.split(torch.randperm(len(images), generator=draws), 64):
            x, y = images[rows], labels[rows]
            if eps:
                x = pgd(network, x, y, eps=radius, steps=5, step_size=radius / 2, generator=draws)
            network.train()
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(x), y))
            optimizer.step()
    return network.eval()


@functools.cache
def training_data(dataset: str, data_root: Path) -> Data:
    """Return training images and labels."""
    if dataset == "digits":
        images, labels, _, _ = defences.digits()
        return images, labels
    if dataset == "photographs":
        images, labels = _photographs(data_root)
        rest = torch.arange(len(images)) % 4 > 0
        return images[rest].float() / 255, labels[rest]
    train_set = MNIST(str(data_root), train=True)
    return (train_set.data[:TRAINING_IMAGES].float() / 255).unsqueeze(1), train_set.targets[:TRAINING_IMAGES]


def checked_data(dataset: str, data_root: Path, count: int) -> Data:
    """Return the images to check a network on, and their labels."""
    if dataset == "digits":
        return defences.sample(count)
    if dataset == "photographs":
        images, labels = _photographs(data_root)
        chosen = torch.randperm(len(images[::4]), generator=generator(0, "photographs"))[:count]
        return images[::4][chosen].float() / 255, labels[::4][chosen]
    return load_images(dataset, data_root, count)


@functools.cache
def _photographs(data_root: Path) -> Data:
    """Return 8-bit photographs N×3×64×64 of a few classes of CALTECH-101, and labels."""
    folder = ImageFolder(str(data_root / "caltech101" / "101_ObjectCategories"))
    images, labels = list[Tensor](), list[int]()
    for label, name in enumerate(PHOTOGRAPHS):
        paths = [path for path, index in folder.samples if index == folder.class_to_idx[name]][:PER_CLASS]
        images += [resize(pil_to_tensor(folder.loader(path)), [SIDE, SIDE], antialias=True) for path in paths]
        labels += [label] * len(paths)
    return torch.stack(images), torch.tensor(labels)


def _trained(
    make: Callable[[], nn.Module], dataset: str, epochs: int, *, eps: float = 0.0
) -> Callable[[Path, Path], nn.Module]:
    def build(data_root: Path, weights: Path) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return train(make(), training_data(dataset, data_root), epochs, eps=eps)

    return build


def _timm(name: str, epochs: int, **options: Any) -> Callable[[Path, Path], nn.Module]:
    return _trained(lambda: timm.create_model(name, num_classes=len(PHOTOGRAPHS), **options), "photographs", epochs)


def _reference(name: str) -> HonestNetwork:
    kinds = {"trades": "ReLU, max pooling, TRADES", "wongk": "ReLU, certified", "colt": "ReLU, certified"}
    kind = next((k for start, k in kinds.items() if name.startswith(start)), "residual, ReLU")
    reference = NETWORKS[name]
    kind = kind if reference.build is not None else "zoo, PGD-trained"
    return HonestNetwork(kind, reference.dataset, reference.eps, lambda data_root, weights: load_network(name, weights))


def _zoo(name: str) -> Callable[[Path, Path], nn.Module]:
    import robustfpd as rf

    return lambda data_root, weights: rf.load(name).classifier().eval()


def _filtered(make: Callable[[], nn.Module], ranks: tuple[int, int]) -> Callable[[Path, Path], nn.Module]:
    return lambda data_root, weights: nn.Sequential(defences.OrderStatistic(*ranks), make()).eval()


def _filtered_lenet(data_root: Path, weights: Path) -> nn.Module:
    return nn.Sequential(defences.OrderStatistic(), _trained(lenet, "mnist", 3)(data_root, weights)).eval()


HONEST: dict[str, HonestNetwork] = {
    "digits-relu": HonestNetwork("ReLU", "digits", 0.15, lambda data, weights: defences.plain()),
    "digits-relu-small-eps": HonestNetwork("ReLU", "digits", 0.03, lambda data, weights: defences.plain(1)),
    "digits-pgd": HonestNetwork("ReLU, PGD-trained", "digits", 0.15, lambda data, weights: defences.pgd_trained()),
    "digits-elu": HonestNetwork("ELU", "digits", 0.15, _trained(lambda: defences.Net(nn.ELU()), "digits", 12)),
    "digits-gelu": HonestNetwork("GELU", "digits", 0.15, _trained(lambda: defences.Net(nn.GELU()), "digits", 12)),
    "digits/mini-fpd": HonestNetwork("FPD", "digits", 0.15, lambda data, weights: defences.fpd()),
    "digits-median": HonestNetwork("median filter, ReLU", "digits", 0.15, _filtered(defences.plain, (4, 5))),
    "digits-trimmed-mean": HonestNetwork("trimmed mean, ReLU", "digits", 0.15, _filtered(defences.plain, (3, 6))),
    "digits-pgd-median": HonestNetwork("median filter, PGD", "digits", 0.15, _filtered(defences.pgd_trained, (4, 5))),
    "lenet-max": HonestNetwork("ReLU, max pooling", "mnist", 0.1, _trained(lenet, "mnist", 3)),
    "lenet-average": HonestNetwork(
        "ReLU, average pooling", "mnist", 0.1, _trained(lambda: lenet(pool=nn.AvgPool2d), "mnist", 3)
    ),
    "lenet-elu": HonestNetwork("ELU, max pooling", "mnist", 0.1, _trained(lambda: lenet(nn.ELU), "mnist", 3)),
    "lenet-max-pgd": HonestNetwork("ReLU, max pooling, PGD", "mnist", 0.3, _trained(lenet, "mnist", 6, eps=0.3)),
    "lenet-median": HonestNetwork("median filter, max pooling", "mnist", 0.1, _filtered_lenet),
    "mnist-residual": HonestNetwork("residual, batch norm", "mnist", 0.1, _trained(residual_network, "mnist", 3)),
    "mnist/mini-baseline": HonestNetwork("zoo", "mnist", 0.1, _zoo("mnist/mini-baseline")),
    "mnist/mini-fpd": HonestNetwork("FPD", "mnist", 0.1, _zoo("mnist/mini-fpd")),
    "photographs-resnet10t": HonestNetwork(
        "timm, batch norm, max pooling", "photographs", 8 / 255, _timm("resnet10t", 16)
    ),
    "photographs-convnext": HonestNetwork("timm, GELU, layer norm", "photographs", 8 / 255, _timm("convnext_atto", 16)),
    "photographs-vit": HonestNetwork(
        "timm, attention", "photographs", 8 / 255,
        _timm("vit_tiny_patch16_224", 16, img_size=SIDE, patch_size=8, depth=4),
    ),
    "photographs-mobilenet": HonestNetwork(
        "timm, hard swish", "photographs", 8 / 255, _timm("mobilenetv3_small_050", 16)
    ),
    **{name: _reference(name) for name in NETWORKS},
}  # fmt: skip
"""By name."""
