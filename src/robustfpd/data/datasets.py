"""Data sets by name: uint8 images in memory, split into train, validation and test."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from robustfpd.config import DataConfig, TaskConfig
from robustfpd.errors import InputError, MissingDataError, first_line, unknown_name
from robustfpd.seeding import generator


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set holds."""

    name: str
    num_classes: int
    in_channels: int
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    description: str

    @property
    def task(self) -> TaskConfig:
        """The classification task it poses."""
        return TaskConfig(num_classes=self.num_classes, in_channels=self.in_channels, image_size=self.image_size)


@dataclass(frozen=True)
class ImageSet:
    """Images N×C×H×W as uint8 and their labels N as int64, on the CPU."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> ImageSet:
        """The images at `indices`."""
        return ImageSet(self.images[indices], self.labels[indices])

    def floats(self) -> tuple[Tensor, Tensor]:
        """Images as float32 in [0, 1], and labels."""
        return self.images.float() / 255, self.labels

    def digest(self) -> str:
        """SHA-256 of images and labels, to tell whether two runs saw the same."""
        digest = hashlib.sha256(self.images.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Splits:
    """A data set, split. Validation images come out of the training images; the test set is left alone."""

    info: DatasetInfo
    train: ImageSet
    validation: ImageSet
    test: ImageSet


def names() -> list[str]:
    """Names of all data sets."""
    return sorted(_SOURCES)


def info(name: str) -> DatasetInfo:
    """Describe a data set without reading it; an unknown name is an InputError."""
    if name not in _SOURCES:
        raise unknown_name("dataset", name, _SOURCES)
    return _SOURCES[name][0]


def load(config: DataConfig) -> Splits:
    """Read a data set and split it.

    Validation is a stratified share of the training images, the same for every run with the same
    `split_seed`.

    Raises:
        InputError: unknown name, or damaged files.
        MissingDataError: the files are not in `config.root` and `config.download` is off.
    """
    described = info(config.dataset)
    train, test = _SOURCES[config.dataset][1](described, config)
    rest, held_out = stratified(train.labels, config.validation_fraction, config.split_seed, "validation")
    if config.train_limit is not None:
        rest = rest[torch.randperm(len(rest), generator=generator(config.split_seed, "limit"))][: config.train_limit]
    return Splits(described, train.take(rest), train.take(held_out), test)


def stratified(labels: Tensor, fraction: float, seed: int, purpose: str) -> tuple[Tensor, Tensor]:
    """Split indices so that each class of two or more gives `fraction` of its images, at least one, to the second part.

    Returns:
        Two sorted index tensors that partition the images.
    """
    second = torch.zeros(len(labels), dtype=torch.bool)
    draws = generator(seed, "split", purpose)
    for label in sorted(set(labels.tolist())):
        members = torch.nonzero(labels == label).flatten()
        order = members[torch.randperm(len(members), generator=draws)]
        count = min(len(members) - 1, max(1, round(fraction * len(members))))  # a class of one stays in the first part
        second[order[:count]] = True
    return torch.nonzero(~second).flatten(), torch.nonzero(second).flatten()


def _digits(described: DatasetInfo, config: DataConfig) -> tuple[ImageSet, ImageSet]:
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = torch.from_numpy(bundle.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)  # N 1 8 8
    whole = ImageSet(images, torch.from_numpy(bundle.target).long())
    train, test = stratified(whole.labels, 0.2, 0, "test")  # no setting moves test images into training
    return whole.take(train), whole.take(test)


def _torchvision(class_name: str) -> Callable[[DatasetInfo, DataConfig], tuple[ImageSet, ImageSet]]:
    def read(described: DatasetInfo, config: DataConfig) -> tuple[ImageSet, ImageSet]:
        import torchvision.datasets

        kind = getattr(torchvision.datasets, class_name)
        root = Path(config.root).expanduser()
        folder = root / class_name / "raw"
        if not config.download and not folder.is_dir():
            raise MissingDataError(
                f"{described.name} is not there: looked in {folder.absolute()}; add --download to fetch it, "
                f"or give the folder that holds {class_name}/ as --data-root"
            )
        try:
            parts = [kind(root, train=train, download=config.download) for train in (True, False)]
            train, test = (ImageSet(part.data.unsqueeze(1).contiguous(), part.targets.long()) for part in parts)
        except (RuntimeError, OSError, ValueError, EOFError, TypeError, LookupError, AssertionError) as error:
            what = "could not be fetched into" if config.download else "is incomplete or damaged in"
            raise MissingDataError(
                f"{described.name} {what} {folder.absolute()} ({first_line(error)}); "
                "delete that folder and add --download to fetch it anew"
            ) from None
        for part in (train, test):
            if part.images.shape[1:] != (1, *described.image_size) or len(part.images) != len(part.labels):
                raise InputError(f"{described.name} in {folder.absolute()} has shape {tuple(part.images.shape)}")
            if not 0 <= int(part.labels.min()) <= int(part.labels.max()) < described.num_classes:
                raise InputError(
                    f"{described.name} in {folder.absolute()} has labels {int(part.labels.min())} to "
                    f"{int(part.labels.max())}, not 0 to {described.num_classes - 1}"
                )
        return train, test

    return read


_DIGIT_NAMES = tuple(str(d) for d in range(10))
_FASHION_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")

_Source = Callable[[DatasetInfo, DataConfig], tuple[ImageSet, ImageSet]]
_SOURCES: dict[str, tuple[DatasetInfo, _Source]] = {
    "digits": (
        DatasetInfo("digits", 10, 1, (8, 8), _DIGIT_NAMES, "1,797 handwritten digits that come with scikit-learn"),
        _digits,
    ),
    "mnist": (
        DatasetInfo("mnist", 10, 1, (28, 28), _DIGIT_NAMES, "70,000 handwritten digits"),
        _torchvision("MNIST"),
    ),
    "fashion_mnist": (
        DatasetInfo("fashion_mnist", 10, 1, (28, 28), _FASHION_NAMES, "70,000 pictures of clothes"),
        _torchvision("FashionMNIST"),
    ),
}
