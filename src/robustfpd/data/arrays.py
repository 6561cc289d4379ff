"""Data sets that fit into memory: arrays with a test set of their own."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustfpd.config import DataConfig
from robustfpd.data.decode_cache import OnProgress, cached_images, decoding_progress, images_folder
from robustfpd.data.download import exclusive_lock, move_aside
from robustfpd.data.image_files import Pixels, covering
from robustfpd.data.image_set import DatasetInfo, ImageSet, Parts
from robustfpd.data.splits import stratified
from robustfpd.data.transforms import centre_crop
from robustfpd.errors import InputError, MissingDataError, first_line

UNREADABLE = (RuntimeError, OSError, ValueError, EOFError, TypeError, LookupError, AssertionError)
"""What torchvision raises on files that are not whole, or cannot be fetched."""

Pair = tuple[Tensor, Tensor]
"""Images N×C×H×W uint8 and labels N."""


@dataclass(frozen=True)
class Arrays:
    """How to read a data set of torchvision's: its class, the choice of its parts, and their tensors."""

    class_name: str
    choices: tuple[dict[str, Any], dict[str, Any]]
    tensors: Callable[[Any], Pair]

    def __call__(self, described: DatasetInfo, config: DataConfig, on_progress: OnProgress | None) -> Parts:
        """Read the training and the test part."""
        train, test = self._read(described, config)
        return sized(train, test, described, config, on_progress)

    def _read(self, described: DatasetInfo, config: DataConfig) -> tuple[Pair, Pair]:
        import torchvision.datasets

        kind = getattr(torchvision.datasets, self.class_name)
        root = Path(config.root).expanduser()
        place = root / described.files[0]
        if not config.download and not place.exists():
            raise MissingDataError(
                f"{described.name} is not there: looked in {place.absolute()}; add --download to fetch it, "
                f"or give the folder that holds {Path(described.files[0]).parts[0]} as --data-root"
            )
        try:
            with exclusive_lock(root / f".{self.class_name}.lock") if config.download else nullcontext():
                train, test = self._fetched(kind, root, place, config.download)
        except UNREADABLE as error:
            what = "could not be fetched into" if config.download else "is incomplete or damaged in"
            remedy = "delete that folder and add" if place.is_dir() else "add"
            raise MissingDataError(
                f"{described.name} {what} {(place if place.is_dir() else root).absolute()} ({first_line(error)}); "
                f"{remedy} --download to fetch it anew"
            ) from None
        for images, labels in (train, test):
            _check(images, labels, described, place)
        return train, test

    def _fetched(self, kind: Any, root: Path, place: Path, download: bool) -> list[Pair]:
        """Both parts; torchvision knows no checksum of unpacked files, so a folder it cannot read is fetched anew."""

        def read() -> list[Pair]:
            return [self.tensors(kind(root, **choice, download=download)) for choice in self.choices]

        try:
            return read()
        except UNREADABLE:
            if not download or not place.is_dir():
                raise
        aside = move_aside(place)
        try:
            return read()
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            aside.rename(place)
            raise


def read_digits(described: DatasetInfo, config: DataConfig, on_progress: OnProgress | None) -> Parts:
    """Read scikit-learn's digits; a fifth of them tests."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = torch.from_numpy(bundle.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)  # N 1 8 8
    labels = torch.from_numpy(bundle.target).long()
    train, test = stratified(labels, 0.2, 0, "test")  # no setting moves test images into training
    return sized(
        (images[train], labels[train]), (images[test], labels[test]), described, config, on_progress
    )  # fmt: skip


def sized(
    train: Pair, test: Pair, described: DatasetInfo, config: DataConfig, on_progress: OnProgress | None
) -> Parts:  # fmt: skip
    """Resize both parts once where another size is to be stored, and keep them in the cache."""
    seen, size = described.seen(config), described.stored_size(config)

    def stored(images: Tensor, labels: Tensor) -> ImageSet:
        if images.shape[2:] != size:
            images = _resized(images, size, described, config, on_progress)
        return ImageSet(images, labels, seen.in_channels, seen.image_size)

    return Parts(seen, stored(*train), stored(*test))


def _resized(
    images: Tensor, size: tuple[int, int], described: DatasetInfo, config: DataConfig, on_progress: OnProgress | None
) -> Tensor:  # fmt: skip
    source = {"sha256": hashlib.sha256(images.numpy().tobytes()).hexdigest(), "torch": torch.__version__}
    with decoding_progress(described.name, on_progress) as show:
        return cached_images(
            images_folder(config.cache), described.name, source, (len(images), images.shape[1], *size),
            lambda: _pictures(images, size), show,
        ).images  # fmt: skip


def _pictures(images: Tensor, size: tuple[int, int]) -> Iterator[Pixels]:
    """Resize until `size` is just covered (bilinear, antialiased) and crop the centre, as files are."""
    from torchvision.transforms.v2.functional import resize  # type: ignore[attr-defined]

    covered = list(covering(images.shape[2], images.shape[3], size))
    for chunk in torch.split(images, 256):
        yield from centre_crop(resize(chunk, covered, antialias=True), size).contiguous().numpy()


def _check(images: Tensor, labels: Tensor, described: DatasetInfo, place: Path) -> None:
    if images.shape[1:] != (described.in_channels, *described.image_size) or len(images) != len(labels):
        raise InputError(f"{described.name} in {place.absolute()} has shape {tuple(images.shape)}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < described.num_classes:
        raise InputError(
            f"{described.name} in {place.absolute()} has labels {int(labels.min())} to {int(labels.max())}, "
            f"not 0 to {described.num_classes - 1}"
        )


def _grey(part: Any) -> Pair:  # MNIST: N H W
    return part.data.unsqueeze(1).contiguous(), part.targets.long()


def _svhn(part: Any) -> Pair:  # a transposed view, N C H W
    return torch.from_numpy(np.ascontiguousarray(part.data)), torch.from_numpy(part.labels).long()


def _cifar(part: Any) -> Pair:  # N H W C
    return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)


_FLAGS = ({"train": True}, {"train": False})
MNIST = Arrays("MNIST", _FLAGS, _grey)
FASHION_MNIST = Arrays("FashionMNIST", _FLAGS, _grey)
SVHN = Arrays("SVHN", ({"split": "train"}, {"split": "test"}), _svhn)
CIFAR10 = Arrays("CIFAR10", _FLAGS, _cifar)
