"""Images with labels: uint8 as they are stored, floats as the network sees them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from robustfpd.data.mapped import let_go
from robustfpd.errors import InputError


class ImageSet:
    """Images as uint8 and their labels, on the CPU, with the channels and the size that the network sees.

    What `take` returns shares the stored images, so that a split of a memory-mapped file costs no memory.

    Args:
        images: N×C0×H0×W0 uint8, as stored; may be memory-mapped.
        labels: N int64.
        channels: what the network sees; 3 repeats grey images, None takes the stored ones.
        size: height and width of the centre crop that the network sees; None takes the stored ones.
        rows: which of the stored images these are, one for each label; None takes all.

    Raises:
        InputError: channels or a size that cannot be made of the stored ones.
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
                f"data.channels: images of {stored_channels} channels cannot be shown as {self.channels}; "
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
        """Images N×C0×H0×W0 uint8 as stored; of a part that `take` made, a copy."""
        if self._rows is None:
            return self._stored
        copy = self._stored[self._rows]
        let_go(self._stored)
        return copy

    @property
    def stored_size(self) -> tuple[int, int]:
        """Height and width of the images as stored."""
        return self._stored.shape[2], self._stored.shape[3]

    def take(self, indices: Tensor) -> ImageSet:
        """The images at `indices`."""
        rows = indices if self._rows is None else self._rows[indices]
        return ImageSet(self._stored, self.labels[indices], self.channels, self.size, rows=rows)

    def floats(self, indices: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images as the network sees them, N×C×H×W float32 in [0, 1], and labels; of all, or those at `indices`."""
        part = self if indices is None else self.take(indices)
        return as_seen(part.images, self.channels, self.size), part.labels

    def digest(self) -> str:
        """SHA-256 of the images as the network sees them, in 8 bits, and of the labels."""
        digest = hashlib.sha256()
        for rows in torch.split(torch.arange(len(self)), 1024):  # a memory-mapped set may be larger than memory
            seen = centre_crop(self.take(rows).images, self.size)
            seen = seen if seen.shape[1] == self.channels else seen.repeat(1, self.channels, 1, 1)
            digest.update(seen.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()


def as_seen(images: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Turn stored images N×C0×H0×W0 uint8 into the network's N×C×H×W float32 in [0, 1]: cropped, grey repeated."""
    seen = centre_crop(images, size).float().div_(255)
    return seen if seen.shape[1] == channels else seen.repeat(1, channels, 1, 1)


def centre_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of images N×C×H0×W0, N×C×H×W."""
    height, width = size
    top, left = margin(images.shape[-2], height), margin(images.shape[-1], width)
    return images[..., top : top + height, left : left + width]


def margin(whole: int, part: int) -> int:
    """Pixels before the middle `part` of a side; an odd number is halved as torchvision does, to the even side."""
    return round((whole - part) / 2)
