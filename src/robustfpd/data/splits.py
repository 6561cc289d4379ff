"""Splits of the labelled images into training, validation and test sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robustfpd.config import DataConfig
from robustfpd.errors import InputError
from robustfpd.rng import generator


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


def in_file_order(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Split indices as the authors do: of each class, in file order, the first part trains and the next one tests.

    Both counts are rounded down, so that an image may be left over.

    Returns:
        Two sorted index tensors without common images.
    """
    first, second = [], []
    for label in sorted(set(labels.tolist())):
        members = torch.nonzero(labels == label).flatten()
        count = _floor(len(members) * (1 - fraction))
        first.append(members[:count])
        second.append(members[count : count + _floor(len(members) * fraction)])
    return torch.cat(first).sort().values, torch.cat(second).sort().values


def train_and_test(labels: Tensor, class_names: Sequence[str], config: DataConfig) -> tuple[Tensor, Tensor]:
    """Draw a test set where the data set has none, as `config.split` says.

    Raises:
        InputError: a class would be left without training or without test images.
    """
    if config.split == "published":
        train, test = in_file_order(labels, config.test_fraction)
    else:
        train, test = stratified(labels, config.test_fraction, config.split_seed, "test")
    for name, part in (("training", train), ("test", test)):
        counts = torch.bincount(labels[part], minlength=len(class_names))
        if not int(counts.min()):
            label = int(counts.argmin())
            raise InputError(
                f"class {class_names[label]!r} has {int((labels == label).sum())} images, too few for a {name} image "
                f"with data.test_fraction={config.test_fraction:g}; add images, or change data.test_fraction"
            )
    return train, test


def _floor(count: float) -> int:
    """Round down, after removing rounding errors: 10 * (1 - 0.9) is one image."""
    return int(round(count, 6))
