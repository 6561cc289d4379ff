"""Data sets by name: load and split, count, or list the files on this machine."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from robustfpd.config import DataConfig
from robustfpd.data import arrays, image_folder
from robustfpd.data.decode_cache import SUFFIX, OnProgress, images_folder
from robustfpd.data.download import interrupted
from robustfpd.data.image_files import EXTENSIONS
from robustfpd.data.image_set import DatasetInfo, ImageSet
from robustfpd.data.splits import stratified
from robustfpd.errors import unknown_name
from robustfpd.rng import generator


@dataclass(frozen=True)
class Splits:
    """Training, validation and test images of a data set.

    Validation images are held out of the training images; with `selection: test`, as published, they are the test
    images.
    """

    info: DatasetInfo
    """The data set with the channels and the size that the network sees."""
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    skipped: tuple[str, ...] = ()
    """Files that cannot be decoded, relative to the data set's folder."""


def names() -> list[str]:
    """Return the names of all data sets."""
    return sorted(_INFOS)


def info(name: str) -> DatasetInfo:
    """Return the description of a data set, without reading it; an unknown name is an InputError."""
    if name not in _INFOS:
        raise unknown_name("dataset", name, _INFOS)
    return _INFOS[name]


def load(config: DataConfig, on_progress: OnProgress | None = None) -> Splits:
    """Read a data set and split it.

    The validation set is a stratified share of the training images, the same for every run with the same
    `split_seed`. Image files are decoded once and memory-mapped from the cache afterwards.

    Args:
        config: data set, image size and split.
        on_progress: called with the number of decoded images and the total; None shows a bar in a terminal.

    Raises:
        InputError: unknown name, settings that do not fit the images, or damaged files.
        MissingDataError: the files are not in `config.root` and `config.download` is off.
    """
    dataset = info(config.dataset)
    if config.dataset in image_folder.LISTINGS:
        parts = image_folder.read_images(
            image_folder.LISTINGS[config.dataset](dataset, config), dataset, config, on_progress
        )
    else:
        parts = arrays.READERS[config.dataset](dataset, config, on_progress)
    rest, held_out = _held_out(parts.train.labels, config)
    validation = parts.test if held_out is None else parts.train.take(held_out)
    return Splits(parts.info, parts.train.take(rest), validation, parts.test, parts.skipped)


@dataclass(frozen=True)
class Counts:
    """Number of images in each part of a data set."""

    info: DatasetInfo
    """The data set with the channels and the size that the network sees."""
    train: int
    validation: int
    test: int


def count(config: DataConfig) -> Counts:
    """Count the images that `load` returns; files are listed, not decoded, and nothing is downloaded or written.

    Raises:
        InputError: as `load`, except for files that cannot be decoded.
    """
    dataset, config = info(config.dataset), config.model_copy(update={"download": False})
    if config.dataset not in image_folder.LISTINGS:
        splits = load(config)
        return Counts(splits.info, len(splits.train), len(splits.validation), len(splits.test))
    listing = image_folder.LISTINGS[config.dataset](dataset, config)
    train, test = image_folder.split_listing(listing, torch.arange(len(listing.files)), config)
    rest, held_out = _held_out(listing.labels[train], config)
    dataset = replace(dataset, num_classes=len(listing.class_names), class_names=listing.class_names)
    validation = len(test) if held_out is None else len(held_out)
    return Counts(dataset.seen(config), len(rest), validation, len(test))


def _held_out(labels: Tensor, config: DataConfig) -> tuple[Tensor, Tensor | None]:
    """Return the indices of training and validation images; None if the test images are the validation set."""
    rest, held_out = torch.arange(len(labels)), None
    if config.selection != "test":
        rest, held_out = stratified(labels, config.validation_fraction, config.split_seed, "validation")
    if config.train_limit is not None:
        rest = rest[torch.randperm(len(rest), generator=generator(config.split_seed, "limit"))][: config.train_limit]
    return rest, held_out


_DIGITS = tuple(str(d) for d in range(10))
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")
_CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_INFOS = {
    dataset.name: dataset
    for dataset in (
        DatasetInfo("digits", 10, 1, (8, 8), _DIGITS, "1,797 handwritten digits that come with scikit-learn"),
        DatasetInfo("mnist", 10, 1, (28, 28), _DIGITS, "70,000 handwritten digits", ("MNIST/raw",), "12 MB"),
        DatasetInfo("fashion_mnist", 10, 1, (28, 28), _FASHION, "70,000 pictures of clothes",
                    ("FashionMNIST/raw",), "31 MB"),
        DatasetInfo("svhn", 10, 3, (32, 32), _DIGITS, "99,289 digits of house numbers",
                    ("train_32x32.mat", "test_32x32.mat"), "246 MB"),
        DatasetInfo("cifar10", 10, 3, (32, 32), _CIFAR, "60,000 pictures of animals and vehicles",
                    ("cifar-10-batches-py",), "170 MB"),
        DatasetInfo("caltech101", 101, 3, (224, 224), image_folder.CLASSES_101,
                    "8,677 photographs, and 467 of background", (image_folder.ARCHIVE_101.folder,), "137 MB"),
        DatasetInfo("caltech256", 256, 3, (224, 224), (), "29,780 photographs, and 827 of clutter",
                    (image_folder.ARCHIVE_256.folder,), "1.2 GB"),
        DatasetInfo("folder", 0, 3, (224, 224), (), "any folder that holds a folder of images per class"),
    )
}  # fmt: skip


def class_names(config: DataConfig, num_classes: int) -> tuple[str, ...]:
    """Return class names in the order of the labels, without reading images; empty if they are not known.

    They come from the data set's description, else from its folders if there are `num_classes` of them.
    """
    names = info(config.dataset).class_names
    if config.dataset == "caltech101" and config.background:
        names = (image_folder.BACKGROUND_101, *names)
    if not names:
        root = Path(config.root).expanduser()
        root = root / image_folder.ARCHIVE_256.folder if config.dataset == "caltech256" else root
        with suppress(OSError):  # missing or not readable
            train = root / "train"
            names = (train.is_dir() and image_folder.class_folders(train)) or image_folder.class_folders(root)
        if config.dataset == "caltech256":  # the folder of clutter comes last
            names = tuple(name.partition(".")[2] or name for name in names)[:num_classes]
    return names if len(names) == num_classes else ()


@dataclass(frozen=True)
class LocalDataset:
    """A data set and its files on this machine."""

    info: DatasetInfo
    there: bool
    """Whether its files exist, judged by names; True for bundled data sets, False for `folder`."""
    images: int | None
    """Number of image files; None if files hold many images each, or do not exist."""
    classes: int
    """Number of class folders, or of known classes if there are no folders."""
    size: int
    """Bytes below the data root."""
    cached: int
    """Bytes of decoded images in the cache."""


def inventory(root: str | Path, cache: str | Path | None = None) -> list[LocalDataset]:
    """List every data set with its files below `root` and its decoded images in the cache (None: the cache folder)."""
    return [_local(info(name), Path(root).expanduser(), images_folder(cache)) for name in names()]


def _local(dataset: DatasetInfo, root: Path, cache: Path) -> LocalDataset:
    paths = [root / file for file in dataset.files]
    archive = image_folder.ARCHIVES.get(dataset.name)
    incomplete = archive is not None and interrupted(archive, paths[0]) is not None
    there = dataset.name != "folder" and not incomplete and all(path.exists() for path in paths)
    images, classes, size = 0, 0, 0
    for path in paths:
        for file in _files(path):
            size += file.stat().st_size
            images += file.name.lower().endswith(EXTENSIONS)
        classes += sum(1 for entry in path.iterdir() if entry.is_dir()) if images else 0
    there = there and (size > 0 or not paths)  # a data set of empty folders does not exist
    cached = sum(path.stat().st_size for path in cache.glob(f"{dataset.name}-*{SUFFIX}"))
    return LocalDataset(dataset, there, images or None, classes or dataset.num_classes, size, cached)


def _files(path: Path) -> list[Path]:
    """List all files at or below `path`."""
    if path.is_file():
        return [path]
    files = (Path(folder, name) for folder, _, names in os.walk(path, followlinks=True) for name in names)
    return [file for file in files if file.is_file()]
