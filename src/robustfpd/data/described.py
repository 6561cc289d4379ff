"""What a data set is, before and after it was read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from robustfpd.config import DataConfig, TaskConfig
from robustfpd.data.image_set import ImageSet
from robustfpd.errors import InputError

OnProgress = Callable[[int, int], None]
"""Told how many images are decoded, and of how many."""


@dataclass(frozen=True)
class DatasetInfo:
    """What a data set holds."""

    name: str
    num_classes: int
    """0 where the files alone tell."""
    in_channels: int
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    """Empty where the files alone tell."""
    description: str
    files: tuple[str, ...] = ()
    """Where it lies below the data root."""
    download: str = ""
    """Size of what is fetched."""

    @property
    def task(self) -> TaskConfig:
        """The classification task it poses."""
        return TaskConfig(num_classes=self.num_classes, in_channels=self.in_channels, image_size=self.image_size)

    def seen(self, config: DataConfig) -> DatasetInfo:
        """The same data set as a network sees it under `config`; channels that cannot be had are an InputError."""
        channels = config.channels or self.in_channels
        if channels < self.in_channels:
            raise InputError(
                f"data.channels: {self.name} has RGB images, which are not shown as grey ones; leave it out, or give 3"
            )
        return replace(self, in_channels=channels, image_size=config.image_size or self.image_size)

    def stored_size(self, config: DataConfig) -> tuple[int, int]:
        """Height and width of the images in memory; an InputError where the network's do not fit in."""
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
    """A data set as read: all images to train with, and the test images."""

    info: DatasetInfo
    train: ImageSet
    test: ImageSet
    skipped: tuple[str, ...] = ()
    """Files that cannot be decoded and were left out, below the data set's folder."""
