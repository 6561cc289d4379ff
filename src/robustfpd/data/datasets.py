"""Data sets by name: loaded as uint8 images and split, counted, or listed as they lie on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from robustfpd.config import DataConfig
from robustfpd.data import arrays
from robustfpd.data.decode_cache import SUFFIX, OnProgress, images_folder
from robustfpd.data.download import interrupted
from robustfpd.data.image_files import EXTENSIONS
from robustfpd.data.image_folder import (
    ARCHIVE_101,
    ARCHIVE_256,
    ARCHIVES,
    BACKGROUND_101,
    CLASSES_101,
    Listing,
    caltech101_listing,
    caltech256_listing,
    class_folders,
    folder_listing,
    read_caltech101,
    read_caltech256,
    read_folder,
    split_listing,
)
from robustfpd.data.image_set import DatasetInfo, ImageSet, Parts
from robustfpd.data.splits import stratified
from robustfpd.errors import unknown_name
from robustfpd.rng import generator


@dataclass(frozen=True)
class Splits:
    """A data set, split. Validation images come out of the training images; the test set is left alone.

    With `selection: test`, as published, validation and test images are the same.
    """

    info: DatasetInfo
    """As the network sees it: with the channels and the size that the settings ask for."""
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    skipped: tuple[str, ...] = ()
    """Files that cannot be decoded and were left out, below the data set's folder."""


def names() -> list[str]:
    """Names of all data sets."""
    return sorted(_SOURCES)


def info(name: str) -> DatasetInfo:
    """Describe a data set without reading it; an unknown name is an InputError."""
    if name not in _SOURCES:
        raise unknown_name("dataset", name, _SOURCES)
    return _SOURCES[name][0]


def load(config: DataConfig, on_progress: OnProgress | None = None) -> Splits:
    """Read a data set and split it.

    Validation is a stratified share of the training images, the same for every run with the same
    `split_seed`. Image files are decoded once and memory-mapped from the cache afterwards.

    Args:
        config: which images, at which size, and how they are split.
        on_progress: called with the number of decoded images, and of all; None shows a bar in a terminal.

    Raises:
        InputError: unknown name, settings that do not fit the images, or damaged files.
        MissingDataError: the files are not in `config.root` and `config.download` is off.
    """
    described = info(config.dataset)
    parts = _SOURCES[config.dataset][1](described, config, on_progress)
    rest, held_out = _held_out(parts.train.labels, config)
    validation = parts.test if held_out is None else parts.train.take(held_out)
    return Splits(parts.info, parts.train.take(rest), validation, parts.test, parts.skipped)


@dataclass(frozen=True)
class Counts:
    """How many images each part of a data set has."""

    info: DatasetInfo
    """As the network sees it."""
    train: int
    validation: int
    test: int


def count(config: DataConfig) -> Counts:
    """Count the images that `load` would give; files are listed, not decoded, and nothing is fetched or written.

    Raises:
        InputError: as `load` does, but for files that cannot be decoded.
    """
    described, config = info(config.dataset), config.model_copy(update={"download": False})
    if config.dataset not in _LISTINGS:
        splits = load(config)
        return Counts(splits.info, len(splits.train), len(splits.validation), len(splits.test))
    listing = _LISTINGS[config.dataset](described, config)
    train, test = split_listing(listing, torch.arange(len(listing.files)), config)
    rest, held_out = _held_out(listing.labels[train], config)
    named = replace(described, num_classes=len(listing.class_names), class_names=listing.class_names)
    validation = len(test) if held_out is None else len(held_out)
    return Counts(named.seen(config), len(rest), validation, len(test))


def _held_out(labels: Tensor, config: DataConfig) -> tuple[Tensor, Tensor | None]:
    """Places of the images to train on and to hold out; None holds out none, because the test images select."""
    rest, held_out = torch.arange(len(labels)), None
    if config.selection != "test":
        rest, held_out = stratified(labels, config.validation_fraction, config.split_seed, "validation")
    if config.train_limit is not None:
        rest = rest[torch.randperm(len(rest), generator=generator(config.split_seed, "limit"))][: config.train_limit]
    return rest, held_out


_DIGITS = tuple(str(d) for d in range(10))
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_Source = Callable[[DatasetInfo, DataConfig, OnProgress | None], Parts]
_SOURCES: dict[str, tuple[DatasetInfo, _Source]] = {
    "digits": (
        DatasetInfo("digits", 10, 1, (8, 8), _DIGITS, "1,797 handwritten digits that come with scikit-learn"),
        arrays.read_digits,
    ),
    "mnist": (
        DatasetInfo("mnist", 10, 1, (28, 28), _DIGITS, "70,000 handwritten digits", ("MNIST/raw",), "12 MB"),
        arrays.MNIST,
    ),
    "fashion_mnist": (
        DatasetInfo(
            "fashion_mnist", 10, 1, (28, 28), _FASHION, "70,000 pictures of clothes", ("FashionMNIST/raw",), "31 MB"
        ),
        arrays.FASHION_MNIST,
    ),
    "svhn": (
        DatasetInfo(
            "svhn", 10, 3, (32, 32), _DIGITS, "99,289 digits of house numbers",
            ("train_32x32.mat", "test_32x32.mat"), "246 MB",
        ),
        arrays.SVHN,
    ),
    "cifar10": (
        DatasetInfo(
            "cifar10", 10, 3, (32, 32), _CIFAR, "60,000 pictures of animals and vehicles",
            ("cifar-10-batches-py",), "170 MB",
        ),
        arrays.CIFAR10,
    ),
    "caltech101": (
        DatasetInfo(
            "caltech101", 101, 3, (224, 224), CLASSES_101, "8,677 photographs, and 467 of background",
            (ARCHIVE_101.folder,), "137 MB",
        ),
        read_caltech101,
    ),
    "caltech256": (
        DatasetInfo(
            "caltech256", 256, 3, (224, 224), (), "29,780 photographs, and 827 of clutter",
            (ARCHIVE_256.folder,), "1.2 GB",
        ),
        read_caltech256,
    ),
    "folder": (
        DatasetInfo("folder", 0, 3, (224, 224), (), "any folder that holds a folder of images per class"),
        read_folder,
    ),
}  # fmt: skip
_LISTINGS: dict[str, Callable[[DatasetInfo, DataConfig], Listing]] = {
    "caltech101": caltech101_listing, "caltech256": caltech256_listing, "folder": folder_listing,
}  # fmt: skip
"""How data sets of image files are listed."""


def class_names(config: DataConfig, num_classes: int) -> tuple[str, ...]:
    """Return class names in the order of the labels, without reading images; empty where they are not known.

    They come from the data set's description, else from its folders, unless these are not `num_classes`.
    """
    names = info(config.dataset).class_names
    if config.dataset == "caltech101" and config.background:
        names = (BACKGROUND_101, *names)
    if not names:
        root = Path(config.root).expanduser()
        root = root / ARCHIVE_256.folder if config.dataset == "caltech256" else root
        names = _in(root / "train") or _in(root)
        if config.dataset == "caltech256":  # the folder of clutter comes last
            names = tuple(name.partition(".")[2] or name for name in names)[:num_classes]
    return names if len(names) == num_classes else ()


def _in(root: Path) -> tuple[str, ...]:
    try:
        return class_folders(root) if root.is_dir() else ()
    except OSError:
        return ()


@dataclass(frozen=True)
class LocalDataset:
    """A data set and its files on this machine."""

    info: DatasetInfo
    there: bool
    """Whether its files are there, judged by names; True for bundled data sets, False for `folder`."""
    images: int | None
    """Image files; None where files hold many images each, or are not there."""
    classes: int
    """Folders of classes; where there are no such folders, the classes it is known to have."""
    size: int
    """Bytes below the data root."""
    cached: int
    """Bytes of decoded images in the cache."""


def inventory(root: str | Path, cache: str | Path | None = None) -> list[LocalDataset]:
    """Look for every data set below `root`, and for its decoded images in the cache (None: the cache folder)."""
    return [_find(info(name), Path(root).expanduser(), images_folder(cache)) for name in names()]


def _find(described: DatasetInfo, root: Path, cache: Path) -> LocalDataset:
    places = [root / file for file in described.files]
    archive = ARCHIVES.get(described.name)
    partly = archive is not None and interrupted(archive, places[0]) is not None
    there = described.name != "folder" and not partly and all(place.exists() for place in places)
    images, classes, size = 0, 0, 0
    for place in places:
        for file in _files(place):
            size += file.stat().st_size
            images += file.name.lower().endswith(EXTENSIONS)
        classes += sum(1 for entry in os.scandir(place) if entry.is_dir()) if images else 0
    there = there and (size > 0 or not places)  # empty folders hold nothing
    kept = cache.glob(f"{described.name}-*{SUFFIX}")
    cached = sum(path.stat().st_size for path in kept)
    return LocalDataset(described, there, images or None, classes or described.num_classes, size, cached)


def _files(place: Path) -> Iterator[os.DirEntry[str] | Path]:
    """All files at or below `place`."""
    if place.is_file():
        yield place
    if not place.is_dir():
        return
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _files(Path(entry.path))
            elif entry.is_file():
                yield entry
