"""Read the images of an evaluation from tensors, data loaders and other batches, no further than needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, Subset

from robustfpd.errors import InputError
from robustfpd.rng import generator


def read(data: Any, num_images: int | None, seed: int) -> tuple[Any, Any, Tensor | None]:
    """Return images and labels, unchecked, and the index of each image in the data.

    Without an index, None, `data` are in memory, as (images, labels) or as a list of such batches: these are all
    images, to draw from. Of others at most `num_images` are read:

    - of a `DataLoader`, images drawn by `seed`: items of its data set, in the order of its sampler. A loader that
      shuffles is read in the order of its data set.
    - of loaders whose items cannot be counted before they are read (an iterable data set, a batch sampler, batches
      without collation, another `__iter__`) and of any other iterable, the first images.

    Raises:
        InputError: neither (images, labels) nor batches of such as tensors, or none.
    """
    if isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[0], (tuple, list)):
        return data[0], data[1], None
    if not isinstance(data, Iterable):
        raise InputError(f"data must be (images, labels) or batches of such, found {type(data).__name__}")
    if isinstance(data, (tuple, list)):
        return *_concatenate(data, None), None
    if isinstance(data, DataLoader):
        items = _items(data)
        if items is not None:
            chosen = draw_images(len(items), len(items) if num_images is None else num_images, seed)
            images, labels = _concatenate(_loader_of(data, [items[i] for i in chosen.tolist()]), None)
            if len(images) != len(chosen):
                raise InputError(
                    f"the loader's collate_fn returned {len(images)} images for {len(chosen)} items, so that they have "
                    "no number in the data set; leave unreadable items out of the data set, or give (images, labels)"
                )
            return images, labels, chosen
    images, labels = _concatenate(data, num_images)
    return images, labels, torch.arange(len(images))


def draw_images(count: int, num_images: int, seed: int) -> Tensor:
    """Return the sorted indices of at most `num_images` of `count` images, drawn by `seed`."""
    return torch.randperm(count, generator=generator(seed, "images"))[:num_images].sort().values


def _items(loader: DataLoader[Any]) -> Sequence[Any] | None:
    """Return the indices in the data set of a loader's images, in order; None if they are unknown before reading."""
    dataset, sampler = loader.dataset, loader.sampler
    own_order = type(loader).__iter__ is not DataLoader.__iter__ or isinstance(dataset, IterableDataset)
    if own_order or loader.batch_size is None or not isinstance(dataset, Sized) or not isinstance(sampler, Sized):
        return None
    shuffles = isinstance(sampler, RandomSampler) and not sampler.replacement and len(sampler) == len(dataset)
    in_order = shuffles or isinstance(sampler, SequentialSampler)
    items = list(range(len(dataset)) if in_order else sampler)
    return items[: len(items) // loader.batch_size * loader.batch_size] if loader.drop_last else items


def _loader_of(loader: DataLoader[Any], items: Sequence[Any]) -> DataLoader[Any]:
    """Return a loader of these items of the data set, in this order, that collates and works as `loader` does."""
    return DataLoader(
        Subset(loader.dataset, items), loader.batch_size, collate_fn=loader.collate_fn, num_workers=loader.num_workers,
        timeout=loader.timeout, worker_init_fn=loader.worker_init_fn, prefetch_factor=loader.prefetch_factor,
        multiprocessing_context=loader.multiprocessing_context,
    )  # fmt: skip


def _concatenate(batches: Iterable[Any], num_images: int | None) -> tuple[Tensor, Tensor]:
    """Return images and labels of batches, read until there are `num_images`; None reads all."""
    parts: tuple[list[Tensor], list[Tensor]] = [], []
    count = 0
    for batch in batches:
        valid = isinstance(batch, (tuple, list)) and len(batch) == 2
        if not valid or not all(isinstance(part, Tensor) and part.ndim > 0 for part in batch):
            raise InputError(
                f"data must be (images, labels) or batches of such, as tensors; found batches of {type(batch).__name__}"
            )
        for values, part in zip(parts, batch, strict=True):
            values.append(part.detach().cpu())
        count += len(batch[0])
        if num_images is not None and count >= num_images:
            break
    if not parts[0]:
        raise InputError("data must hold at least one image, found none")
    images, labels = (_joined(values) for values in parts)
    return images[:num_images], labels[:num_images]


def _joined(parts: list[Tensor]) -> Tensor:
    """Return what `torch.cat` returns, and empty the list meanwhile, so that no second copy stays in memory."""
    kinds = [(part.dtype, part.shape[1:]) for part in parts]
    for first, other in pairwise(kinds):
        if first != other:
            raise InputError(f"batches of data have different shapes or types: {_named(first)} and {_named(other)}")
    joined, start = parts[0].new_empty((sum(map(len, parts)), *kinds[0][1])), 0
    parts.reverse()
    while parts:
        part = parts.pop()
        joined[start : start + len(part)] = part
        start += len(part)
    return joined


def _named(kind: tuple[torch.dtype, torch.Size]) -> str:
    return f"{kind[0]} {tuple(kind[1])}"
