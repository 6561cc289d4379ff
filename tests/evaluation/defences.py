"""Honest networks on scikit-learn's digits, and bad defences around one of them.

Each bad defence looks robust under a naive attack, or cannot be evaluated; none makes the network more robust. Networks
are trained once per process, when first used.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustfpd as rf
from robustfpd import data
from robustfpd.attacks import pgd
from robustfpd.config import DataConfig

Function = Callable[[Tensor], Tensor]
FPD_FOLDER = Path(__file__).parents[2] / "models" / "digits" / "mini-fpd"
CLASSES = 10


class Net(nn.Module):
    """Two convolutions and two linear layers; `act` and `dropout` are what some defences change."""

    def __init__(self, act: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, padding=1)
        self.fc1, self.fc2 = nn.Linear(32 * 16, 64), nn.Linear(64, CLASSES)
        self.dropout = nn.Dropout(0.5)
        self.act = nn.ReLU() if act is None else act

    def features(self, images: Tensor) -> Tensor:
        x: Tensor = self.act(self.conv2(self.act(self.conv1(images))))
        hidden: Tensor = self.act(self.fc1(x.flatten(1)))
        return hidden

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc2(self.dropout(self.features(images)))
        return logits


class NormalisedNet(Net):
    """Net with batch normalisation after the first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16)

    def features(self, images: Tensor) -> Tensor:
        x: Tensor = self.act(self.conv2(self.act(self.norm(self.conv1(images)))))
        hidden: Tensor = self.act(self.fc1(x.flatten(1)))
        return hidden


class Pooled(nn.Module):
    """LeNet with max pooling, which has kinks where pixels of the background are equal."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, CLASSES),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


class OrderStatistic(nn.Module):
    """Replaces each pixel by order statistics of its neighbourhood, which are differentiable almost everywhere.

    Args:
        first, last: range of the ranks that are averaged, of the nine of a 3×3 neighbourhood; 4, 5 is the median.
    """

    def __init__(self, first: int = 4, last: int = 5) -> None:
        super().__init__()
        self.ranks = slice(first, last)

    def forward(self, images: Tensor) -> Tensor:
        n, c, h, w = images.shape
        windows = F.unfold(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3).reshape(n, c, 9, h * w)
        return windows.sort(dim=2).values[:, :, self.ranks].mean(dim=2).reshape(n, c, h, w)


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; the split on which `digits/mini-fpd` was trained."""
    splits = data.load(DataConfig(dataset="digits"))
    return (*splits.train.floats(), *splits.test.floats())


def sample(count: int) -> tuple[Tensor, Tensor]:
    """The first test images."""
    _, _, images, labels = digits()
    return images[:count], labels[:count]


def train(net: nn.Module, epochs: int, *, noise: float = 0.0, eps: float = 0.0, seed: int = 0) -> nn.Module:
    """Train by cross-entropy on the training images, with noise or under PGD."""
    images, labels, _, _ = digits()
    draws = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(images), generator=draws), 64):
            x, y = images[rows], labels[rows]
            if eps:
                x = pgd(net, x, y, eps=eps, steps=5, step_size=eps / 2, generator=draws)
            x = x + noise * torch.randn(x.shape, generator=draws)
            net.train()
            optimiser.zero_grad()
            torch.autograd.backward(F.cross_entropy(net(x), y))
            optimiser.step()
    return net.eval()


def _seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


@functools.cache
def plain(seed: int = 0) -> Net:
    net = _seeded(lambda: train(Net(), 12, seed=seed), seed)
    assert isinstance(net, Net)
    return net


@functools.cache
def pgd_trained(seed: int = 0) -> nn.Module:
    return _seeded(lambda: train(Net(), 14, eps=0.1, seed=seed), seed)


@functools.cache
def pooled() -> nn.Module:
    return _seeded(lambda: train(Pooled(), 14, eps=0.1))


@functools.cache
def fpd() -> nn.Module:
    return rf.load(FPD_FOLDER).classifier()


# Parts of bad defences.


class Before(nn.Module):
    """A module or a function in front of a network."""

    def __init__(self, net: nn.Module, first: nn.Module | Function) -> None:
        super().__init__()
        self.net, self.first = net, first

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(self.first(images))
        return logits


class After(nn.Module):
    """A function behind a network."""

    def __init__(self, net: nn.Module, last: Function) -> None:
        super().__init__()
        self.net, self.last = net, last

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.net(images))


class Both(nn.Module):
    """A function of images and logits behind a network."""

    def __init__(self, net: nn.Module, last: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.last = net, last

    def forward(self, images: Tensor) -> Tensor:
        return self.last(images, self.net(images))


class Lambda(nn.Module):
    """A function as a module, so that its output can be hooked."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class HardSign(nn.Module):
    """Sign, trained with straight-through gradients and evaluated without any."""

    def forward(self, x: Tensor) -> Tensor:
        hard = torch.where(x >= 0, 1.0, -1.0)
        return hard + (x.clamp(-1, 1) - x.clamp(-1, 1).detach()) if self.training else hard


class WinnersTakeAll(nn.Module):
    """Keeps the largest tenth of each image's activations, which is discontinuous (Xiao et al., ICLR 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        least = flat.topk(max(1, flat.shape[1] // 10), dim=1).values[:, -1:]
        return torch.where(flat >= least, flat, torch.zeros_like(flat)).reshape(x.shape)


class StubbornDropout(nn.Dropout):
    """Cannot be put in evaluation mode."""

    def train(self, mode: bool = True) -> StubbornDropout:
        super().train(True)
        return self


class StubbornNorm(nn.BatchNorm2d):
    """Normalises by the batch's statistics in evaluation mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)


class WrongBackward(torch.autograd.Function):
    """The identity with a random gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return torch.randn_like(gradients[0])


class PartlyReversed(nn.Module):
    """True logits, with reversed gradients for two classes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        masked = logits.argmax(dim=1, keepdim=True) < 2
        return torch.where(masked, 2 * logits.detach() - logits, logits)


class Neighbours(nn.Module):
    """Vote of the nearest training images in the network's features."""

    def __init__(self, net: Net, k: int = 7) -> None:
        super().__init__()
        images, labels, _, _ = digits()
        self.net, self.k, self.labels = net, k, labels
        with torch.no_grad():
            self.memory = net.features(images)

    def forward(self, images: Tensor) -> Tensor:
        near = torch.cdist(self.net.features(images), self.memory).topk(self.k, largest=False).indices
        return F.one_hot(self.labels[near], CLASSES).float().sum(dim=1)


class Ensemble(nn.Module):
    """One of several networks, drawn for each batch."""

    def __init__(self, nets: list[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.nets[int(torch.randint(len(self.nets), (1,)))](images)
        return logits


class Watchful(nn.Module):
    """Remembers its inputs and returns wrong logits for images close to earlier ones."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.seen = net, torch.zeros(0, 64)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        x = images.detach().flatten(1)
        if len(self.seen):
            apart = (x[:, None] - self.seen[None]).abs().amax(dim=2)
            again = ((apart > 0) & (apart < 0.3)).any(dim=1, keepdim=True)
            logits = torch.where(again, logits.roll(1, dims=1).detach(), logits)
        self.seen = torch.cat([self.seen, x])[-256:]
        return logits


def quantise(levels: int) -> Function:
    return lambda x: (x * levels).round() / levels


def _dct() -> Tensor:
    n = torch.arange(8.0)
    basis = torch.cos(torch.pi / 8 * (n[None] + 0.5) * n[:, None]) * 0.5
    basis[0] *= 0.5**0.5
    return basis


def jpeg(x: Tensor) -> Tensor:
    """Round the coefficients of 8×8 blocks."""
    basis = _dct().to(x)
    step = 0.4
    coefficients = ((basis @ x @ basis.T) / step).round() * step
    return (basis.T @ coefficients @ basis).clamp(0, 1)


def blur(x: Tensor) -> Tensor:
    kernel = torch.tensor([[1.0, 2, 1], [2, 12, 2], [1, 2, 1]]).reshape(1, 1, 3, 3) / 24
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel)


def resized(x: Tensor) -> Tensor:
    """Random size, random place."""
    size = int(torch.randint(6, 9, (1,)))
    small = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    left, top = (int(torch.randint(0, 9 - size, (1,))) for _ in range(2))
    return F.pad(small, (left, 8 - size - left, top, 8 - size - top))


def steep(x: Tensor) -> Tensor:
    """A soft staircase made of many shallow ones: gradients vanish on its steps and explode between."""
    for _ in range(12):
        x = x - 0.9 * torch.sin(16 * torch.pi * x) / (16 * torch.pi)
    return x


def root(x: Tensor) -> Tensor:
    """The identity; the gradient of the branch that is not taken is infinite, times zero."""
    return torch.where(x > 0, x.sqrt(), torch.zeros_like(x)).square()


def noise_of_the_image(x: Tensor) -> Tensor:
    """Add noise that depends on the image only."""
    noise = []
    for image in x.detach():
        seed = int.from_bytes(hashlib.sha256(image.numpy().tobytes()).digest()[:4], "big")
        noise.append(torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)))
    return x + 0.15 * torch.stack(noise).to(x)


def through_numpy(x: Tensor) -> Tensor:
    """Clamp with numpy, which fails while gradients are recorded."""
    return torch.from_numpy(np.clip(x.numpy(), 0.02, 0.98))


def two_faced(net: Net) -> Function:
    """Return another network's logits while gradients are recorded."""
    other = _seeded(Net, 5).eval()

    def forward(x: Tensor) -> Tensor:
        logits: Tensor = (other if torch.is_grad_enabled() else net)(x)
        return logits

    return forward


def without_gradients(function: Function) -> Function:
    def inner(x: Tensor) -> Tensor:
        with torch.no_grad():
            return function(x)

    return inner


def _off_manifold(images: Tensor) -> Tensor:
    """Which images have pixels that no digit has, N×1."""
    return ((images * 255 - (images * 255).round()).abs() > 1e-2).flatten(1).any(dim=1, keepdim=True)


def _unsure(images: Tensor, logits: Tensor) -> Tensor:
    return torch.where(logits.softmax(1).amax(1, keepdim=True) < 0.9, torch.zeros_like(logits), logits)


def _abstaining(images: Tensor, logits: Tensor) -> Tensor:
    """Return logits that are constant off the manifold, except that the predicted class stays the largest."""
    own = 1e-3 * F.one_hot(logits.argmax(1), CLASSES).float()
    return torch.where(_off_manifold(images), own, logits)


def _nan(images: Tensor, logits: Tensor) -> Tensor:
    return torch.where(_off_manifold(images), torch.nan, logits)


def _rounded(logits: Tensor) -> Tensor:
    return ((logits.softmax(1) * 100).round() / 100 + 1e-6).log()


def _one_hot(logits: Tensor) -> Tensor:
    return F.one_hot(logits.argmax(dim=1), CLASSES).float()


def _misleading(net: Net) -> nn.Module:
    """Return the logits of one network with the gradients of an untrained one."""
    other = _seeded(Net, 5)
    return Both(net, lambda x, logits: logits.detach() + 1e-2 * other.eval()(x))


def _in_training_mode(net: Net) -> nn.Module:
    copied = _copied(net)
    copied.dropout.train()
    return copied


def _with_dropout(net: Net, dropout: nn.Module) -> nn.Module:
    copied = _copied(net)
    copied.dropout = dropout  # type: ignore[assignment]
    return copied.eval()


def _copied(net: Net) -> Net:
    copied = Net()
    copied.load_state_dict(net.state_dict())
    return copied.eval()


@functools.cache
def _sign_net() -> nn.Module:
    return _seeded(lambda: train(Net(HardSign()), 15))


@functools.cache
def _winners_net() -> nn.Module:
    return _seeded(lambda: train(Net(WinnersTakeAll()), 15))


@functools.cache
def _normalised_net() -> nn.Module:
    net = _seeded(lambda: train(NormalisedNet(), 12))
    assert isinstance(net, NormalisedNet)
    stubborn = StubbornNorm(16)
    stubborn.load_state_dict(net.norm.state_dict())
    net.norm = stubborn
    return net.eval()


@dataclass(frozen=True)
class Bad:
    """A bad defence around the honest network."""

    make: Callable[[Net], nn.Module]
    flag: str = ""
    """The check that must find it; "" where only the verdict counts."""


BAD: dict[str, Bad] = {
    "saturated tanh": Bad(lambda net: After(net, lambda z: (2 * z).tanh()), "squashed-outputs"),
    "logits × 1000": Bad(lambda net: After(net, lambda z: 1000 * z), "vanishing-gradients"),
    "logits × 30": Bad(lambda net: After(net, lambda z: 30 * z)),
    "logits + 1e6": Bad(lambda net: After(net, lambda z: z + 1e6)),
    "softmax": Bad(lambda net: After(net, lambda z: z.softmax(1)), "squashed-outputs"),
    "softmax ^ 0.1": Bad(lambda net: After(net, lambda z: z.softmax(1) ** 0.1)),
    "log of rounded probabilities": Bad(lambda net: After(net, _rounded), "vanishing-gradients"),
    "one-hot": Bad(lambda net: After(net, _one_hot), "vanishing-gradients"),
    "logits of the sharpened": Bad(lambda net: After(net, lambda z: (40 * z).softmax(1).log().clamp_min(-1e3))),
    "quantised in a module": Bad(lambda net: Before(net, Lambda(quantise(4))), "vanishing-gradients"),
    "quantised in forward": Bad(lambda net: Before(net, quantise(4)), "vanishing-gradients"),
    "jpeg": Bad(lambda net: Before(net, Lambda(jpeg)), "vanishing-gradients"),
    "jpeg in forward": Bad(lambda net: Before(net, jpeg), "vanishing-gradients"),
    "no_grad preprocessing": Bad(lambda net: Before(net, without_gradients(blur)), "vanishing-gradients"),
    "detached restoration": Bad(lambda net: Before(net, Lambda(lambda x: blur(x).detach())), "vanishing-gradients"),
    "half-detached restoration": Bad(
        lambda net: Before(net, lambda x: 0.9 * blur(x).detach() + 0.1 * x.flip(3) - 0.1 * x.flip(3).detach() + 0.1 * x)
    ),
    "misleading gradients": Bad(_misleading, "gradient-agreement"),
    "wrong backward": Bad(lambda net: Before(net, WrongBackward.apply), "gradient-agreement"),
    "sign activations": Bad(lambda net: _sign_net(), "vanishing-gradients"),
    "shattered": Bad(lambda net: Before(net, lambda x: x + 0.05 * (200 * x).sin()), "rugged-loss"),
    "finely shattered": Bad(lambda net: Before(net, lambda x: x + 0.01 * (5000 * x).sin()), "gradient-agreement"),
    "steep": Bad(lambda net: Before(net, steep)),
    "NaN gradients": Bad(lambda net: Before(net, root), "vanishing-gradients"),
    "random resizing": Bad(lambda net: Before(net, resized), "randomised-outputs"),
    "input noise": Bad(lambda net: Before(net, lambda x: x + 0.1 * torch.randn_like(x)), "randomised-outputs"),
    "noise of the image's own": Bad(lambda net: Before(net, noise_of_the_image), "gradient-agreement"),
    "functional dropout": Bad(
        lambda net: _with_dropout(net, Lambda(lambda h: F.dropout(h, 0.3, training=True))), "randomised-outputs"
    ),
    "dropout that stays": Bad(lambda net: _with_dropout(net, StubbornDropout(0.3)), "stays-in-evaluation-mode"),
    "dropout in training mode": Bad(_in_training_mode, "training-mode"),
    "random ensemble": Bad(lambda net: Ensemble([net, plain(1), plain(2)]), "randomised-outputs"),
    "batch statistics": Bad(lambda net: _normalised_net(), "batch-composition"),
    "batch mean taken away": Bad(
        lambda net: Before(net, lambda x: x - 0.5 * x.mean(dim=0) + 0.15), "batch-composition"
    ),
    "NaN off the manifold": Bad(lambda net: Both(net, _nan), "finite-outputs"),
    "flat off the manifold": Bad(lambda net: Both(net, _abstaining), "gradient-agreement"),
    "constant when unsure": Bad(lambda net: Both(net, _unsure)),
    "winners take all": Bad(lambda net: _winners_net()),
    "through numpy": Bad(lambda net: Before(net, through_numpy), "vanishing-gradients"),
    "inference mode": Bad(lambda net: Lambda(torch.inference_mode()(net.forward)), "vanishing-gradients"),
    "two-faced": Bad(lambda net: Lambda(two_faced(net)), "wrapper-accuracy"),
    "tiny logits": Bad(lambda net: After(net, lambda z: z * 1e-40)),
    "rounded logits": Bad(lambda net: After(net, lambda z: z.round(decimals=1)), "vanishing-gradients"),
    "finely rounded logits": Bad(lambda net: Both(net, lambda x, z: z + 1e-3 * net(x.flip(3)) - z.frac().detach())),
    "cubic sharpening": Bad(lambda net: After(net, lambda z: z**7)),
    "neighbours' votes": Bad(Neighbours, "vanishing-gradients"),
    "watchful": Bad(Watchful),
}
"""By name."""

HONEST: dict[str, Callable[[], nn.Module]] = {
    "plain": plain, "PGD-trained": pgd_trained, "FPD": fpd, "max pooling, PGD-trained": pooled,
}  # fmt: skip
"""By name."""
