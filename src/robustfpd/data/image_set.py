"""Images with labels (uint8 as stored, floats as the network sees them), their batches, and their description."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robustfpd.config import DataConfig, TaskConfig
from robustfpd.data.decode_cache import release_pages
from robustfpd.data.transforms import as_seen, centre_crop
from robustfpd.distributed import SINGLE_PROCESS, ProcessGroup
from robustfpd.errors import InputError


class ImageSet:
    """Images as uint8 and their labels, on the CPU, with the channels and the size that the network sees.

    `take` shares the stored images, so that a split of a memory-mapped file costs no memory.

    Args:
        images: N×C0×H0×W0 uint8, as stored; may be memory-mapped.
        labels: N int64.
        channels: channels that the network sees; 3 repeats grey images, None takes the stored ones.
        size: height and width of the centre crop that the network sees; None takes the stored size.
        rows: indices into `images`, one for each label; None takes all.

    Raises:
        InputError: channels or a size that the stored images do not have.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, channels: int | None = None, size: tuple[int, int] | None = None, *,
        rows: Tensor | None = None,
    ) -> None:  # fmt: skip
        stored_channels, height, width = images.shape[1:]
        self.labels, self._stored, self._rows = labels, images, rows
        self.channels = stored_channels if channels is None else channels
        self.size: tuple[int, int] = (height, width) if size is None else size
        if self.channels != stored_channels and (stored_channels, self.channels) != (1, 3):
            raise InputError(
                f"data.channels: images of {stored_channels} channels cannot be converted to {self.channels}; "
                f"leave it out, or give {stored_channels}"
            )
        if self.size[0] > height or self.size[1] > width:
            raise InputError(
                f"the network's {self.size[0]}×{self.size[1]} does not fit into stored images of {height}×{width}; "
                "make data.stored_size larger or data.image_size smaller"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """Images N×C0×H0×W0 uint8 as stored; a copy in a subset that `take` returned."""
        if self._rows is None:
            return self._stored
        copy = self._stored[self._rows]
        release_pages(self._stored)
        return copy

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width of the images as stored."""
        return self._stored.shape[2], self._stored.shape[3]

    def take(self, indices: Tensor) -> ImageSet:
        """Return the images at `indices`."""
        rows = indices if self._rows is None else self._rows[indices]
        return ImageSet(self._stored, self.labels[indices], self.channels, self.size, rows=rows)

    def floats(self, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return images N×C×H×W float32 in [0, 1] as the network sees them, and labels; all, or those at `indices`."""
        part = self if indices is None else self.take(indices)
        return as_seen(part.images, self.channels, self.size), part.labels

    def digest(self) -> str:
        """Return the SHA-256 of the uint8 images as the network sees them, and of the labels."""
        digest = hashlib.sha256()
        for rows in torch.split(torch.arange(len(self)), 1024):  # a memory-mapped set may be larger than memory
            seen = centre_crop(self.take(rows).images, self.size)
            seen = seen if seen.shape[1] == self.channels else seen.repeat(1, self.channels, 1, 1)
            digest.update(seen.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def batches(
    data: ImageSet, batch_size: int, device: torch.device, generator: torch.Generator | None = None, *,
    cropped: bool | None = None, group: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield (images N×C×H×W float32 in [0, 1], labels N) on `device`, with the channels that the network sees.

    Args:
        data: the images, uint8 on the CPU; they are copied as uint8 and converted to floats on the device.
        batch_size: number of images in a batch.
        device: device of the batches.
        generator: shuffles, and drops the incomplete last batch (training); None keeps the order and all images.
        cropped: whether images have the network's size, or the stored one, for `augment` to crop them. None: the
            network's size unless they are shuffled.
        group: the ranks that share each batch; only this rank's images are read.
    """
    count = len(data)
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    if generator is not None and count >= batch_size:
        order = order[: count - count % batch_size]
    size = data.size if (generator is None if cropped is None else cropped) else data.stored_size
    for indices in torch.split(order, batch_size):
        part = data.take(indices[group.batch_shard])
        yield as_seen(part.images.to(device), data.channels, size), part.labels.to(device)


def batches_per_epoch(count: int, batch_size: int) -> int:
    """Return the number of batches of a shuffled epoch."""
    return max(1, count // batch_size)


@dataclass(frozen=True)
class DatasetInfo:
    """Description of a data set."""

    name: str
    num_classes: int
    """0 if it depends on the files."""
    in_channels: int
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    """Empty if they depend on the files."""
    description: str
    files: tuple[str, ...] = ()
    """Its files and folders, relative to the data root."""
    download: str = ""
    """Size of the download."""

    @property
    def task(self) -> TaskConfig:
        """Its classification task."""
        return TaskConfig(num_classes=self.num_classes, in_channels=self.in_channels, image_size=self.image_size)

    def seen(self, config: DataConfig) -> DatasetInfo:
        """Return the data set with the channels and the size of `config`; fewer channels are an InputError."""
        channels = config.channels or self.in_channels
        if channels < self.in_channels:
            raise InputError(
                f"data.channels: {self.name} has RGB images, which cannot be converted to grey; leave it out, or give 3"
            )
        return replace(self, in_channels=channels, image_size=config.image_size or self.image_size)

    def stored_size(self, config: DataConfig) -> tuple[int, int]:
        """Return height and width of the stored images; smaller ones than the network's are an InputError."""
        seen = config.image_size or self.image_size
        stored = config.stored_size or seen
        if stored[0] < seen[0] or stored[1] < seen[1]:
            raise InputError(
                f"data.stored_size {stored[0]}×{stored[1]} must be at least the network's size, {seen[0]}×{seen[1]}; "
                "leave it out, or make data.image_size smaller"
            )
        return stored


@dataclass(frozen=True)
class Parts:
    """Training images, before validation images are held out, and test images."""

    info: DatasetInfo
    train: ImageSet
    test: ImageSet
    skipped: tuple[str, ...] = ()
    """Files that cannot be decoded, relative to the data set's folder."""
