"""Batches of an image set on a device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from robustfpd.data.image_set import ImageSet, as_seen
from robustfpd.distributed import SINGLE_PROCESS, ProcessGroup


def batches(
    data: ImageSet,
    batch_size: int,
    device: torch.device,
    generator: torch.Generator | None = None,
    *,
    cropped: bool | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images N×C×H×W float32 in [0, 1], labels N) on `device`, with the channels that the network sees.

    Args:
        data: the images, uint8 on the CPU; they travel as uint8 and become floats on the device.
        batch_size: images a batch.
        device: where the batches are wanted.
        generator: shuffles, and drops the incomplete last batch (training); None keeps the order and all.
        cropped: whether images come at the network's size, or at the stored one, for `augment` to crop them. None:
            at the network's size unless they are shuffled.
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
    """How many batches a shuffled epoch has."""
    return max(1, count // batch_size)
