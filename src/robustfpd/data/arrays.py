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
"""Errors of torchvision on incomplete files and failed downloads."""

Pair = tuple[Tensor, Tensor]
"""Images N×C×H×W uint8 and labels N."""


@dataclass(frozen=True)
class Arrays:
    """Reader of a torchvision data set: its class, the arguments for each part, and the function to tensors."""

    class_name: str
    parts: tuple[dict[str, Any], dict[str, Any]]
    tensors: Callable[[Any], Pair]

    def __call__(self, dataset: DatasetInfo, config: DataConfig, on_progress: OnProgress | None) -> Parts:
        """Read the training and the test images."""
        root = Path(config.root).expanduser()
        path = root / dataset.files[0]
        if not config.download and not path.exists():
            raise MissingDataError(
                f"{dataset.name} is not there: looked in {path.absolute()}; add --download to fetch it, "
                f"or give the folder that holds {Path(dataset.files[0]).parts[0]} as --data-root"
            )
        try:
            with exclusive_lock(root / f".{self.class_name}.lock") if config.download else nullcontext():
                train, test = self._read(root, path, config.download)
        except UNREADABLE as error:
            problem = "could not be fetched into" if config.download else "is incomplete or damaged in"
            folder, fix = (path, "delete that folder and add") if path.is_dir() else (root, "add")
            raise MissingDataError(
                f"{dataset.name} {problem} {folder.absolute()} ({first_line(error)}); {fix} --download to retry"
            ) from None
        for images, labels in (train, test):
            _check(images, labels, dataset, path)
        return resized(train, test, dataset, config, on_progress)

    def _read(self, root: Path, path: Path, download: bool) -> list[Pair]:
        """Read both parts; torchvision has no checksum of unpacked files, so download an unreadable folder again."""
        import torchvision.datasets

        def read() -> list[Pair]:
            dataset = getattr(torchvision.datasets, self.class_name)
            return [self.tensors(dataset(root, **part, download=download)) for part in self.parts]

        try:
            return read()
        except UNREADABLE:
            if not download or not path.is_dir():
                raise
        aside = move_aside(path)
        try:
            return read()
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            aside.rename(path)
            raise


def read_digits(dataset: DatasetInfo, config: DataConfig, on_progress: OnProgress | None) -> Parts:
    """Read scikit-learn's digits and split off a fifth as the test set."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = torch.from_numpy(bundle.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)  # N 1 8 8
    labels = torch.from_numpy(bundle.target).long()
    train, test = stratified(labels, 0.2, 0, "test")  # no setting moves test images into training
    return resized((images[train], labels[train]), (images[test], labels[test]), dataset, config, on_progress)


def resized(
    train: Pair, test: Pair, dataset: DatasetInfo, config: DataConfig, on_progress: OnProgress | None
) -> Parts:  # fmt: skip
    """Return both parts at the stored size; images of another size are resized once and cached."""
    seen, size = dataset.seen(config), dataset.stored_size(config)

    def resize(images: Tensor, labels: Tensor) -> ImageSet:
        if images.shape[2:] != size:
            source = {"sha256": hashlib.sha256(images.numpy().tobytes()).hexdigest(), "torch": torch.__version__}
            shape = (len(images), images.shape[1], *size)
            with decoding_progress(dataset.name, on_progress) as show:
                images = cached_images(
                    images_folder(config.cache), dataset.name, source, shape, lambda: _resize(images, size), show
                ).images
        return ImageSet(images, labels, seen.in_channels, seen.image_size)

    return Parts(seen, resize(*train), resize(*test))


def _resize(images: Tensor, size: tuple[int, int]) -> Iterator[Pixels]:
    """Resize until `size` is just covered (bilinear, antialiased) and crop the centre, as for image files."""
    from torchvision.transforms.v2.functional import resize  # type: ignore[attr-defined]

    covered = list(covering(images.shape[2], images.shape[3], size))
    for chunk in torch.split(images, 256):
        yield from centre_crop(resize(chunk, covered, antialias=True), size).contiguous().numpy()


def _check(images: Tensor, labels: Tensor, dataset: DatasetInfo, path: Path) -> None:
    if images.shape[1:] != (dataset.in_channels, *dataset.image_size) or len(images) != len(labels):
        raise InputError(f"{dataset.name} in {path.absolute()} has shape {tuple(images.shape)}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < dataset.num_classes:
        raise InputError(
            f"{dataset.name} in {path.absolute()} has labels {int(labels.min())} to {int(labels.max())}, "
            f"not 0 to {dataset.num_classes - 1}"
        )


def _grey(part: Any) -> Pair:  # MNIST: N H W
    return part.data.unsqueeze(1).contiguous(), part.targets.long()


def _svhn(part: Any) -> Pair:  # a transposed view, N C H W
    return torch.from_numpy(np.ascontiguousarray(part.data)), torch.from_numpy(part.labels).long()


def _cifar(part: Any) -> Pair:  # N H W C
    return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)


_TRAIN_TEST = ({"train": True}, {"train": False})
READERS: dict[str, Callable[[DatasetInfo, DataConfig, OnProgress | None], Parts]] = {
    "digits": read_digits,
    "mnist": Arrays("MNIST", _TRAIN_TEST, _grey),
    "fashion_mnist": Arrays("FashionMNIST", _TRAIN_TEST, _grey),
    "svhn": Arrays("SVHN", ({"split": "train"}, {"split": "test"}), _svhn),
    "cifar10": Arrays("CIFAR10", _TRAIN_TEST, _cifar),
}
