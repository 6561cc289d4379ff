from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustfpd.data import ImageSet
from robustfpd.data.image_set import batches, batches_per_epoch

CPU = torch.device("cpu")


def numbered(count: int) -> ImageSet:
    labels = torch.arange(count)
    return ImageSet(labels.to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous(), labels)


def labels(count: int, size: int, generator: torch.Generator | None = None) -> list[list[int]]:
    return [batch.tolist() for _, batch in batches(numbered(count), size, CPU, generator)]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, derandomize=True)
@given(count=st.integers(1, 60), size=st.integers(1, 20))
def test_without_a_generator_all_images_come_in_order(count: int, size: int) -> None:
    found = labels(count, size)
    assert [label for batch in found for label in batch] == list(range(count))
    assert all(len(batch) == size for batch in found[:-1])


@settings(deadline=None, derandomize=True)
@given(count=st.integers(1, 60), size=st.integers(1, 20), seed=st.integers(0, 1000))
def test_shuffled_batches_are_whole_and_no_image_comes_twice(count: int, size: int, seed: int) -> None:
    found = labels(count, size, seeded(seed))
    flat = [label for batch in found for label in batch]
    assert len(set(flat)) == len(flat)
    assert len(found) == batches_per_epoch(count, size)
    if count >= size:
        assert {len(batch) for batch in found} == {size}
        assert len(flat) == count - count % size
    else:
        assert sorted(flat) == list(range(count))


def test_every_image_comes_once_when_the_batches_come_out_even() -> None:
    flat = [label for batch in labels(40, 8, seeded(0)) for label in batch]
    assert sorted(flat) == list(range(40))
    assert flat != list(range(40))


def test_the_generator_decides_the_order() -> None:
    assert labels(40, 8, seeded(0)) == labels(40, 8, seeded(0))
    assert labels(40, 8, seeded(0)) != labels(40, 8, seeded(1))


def test_an_epoch_goes_on_where_the_generator_stands() -> None:
    generator = seeded(0)
    assert labels(40, 8, generator) != labels(40, 8, generator)


def test_images_arrive_as_floats_with_their_labels() -> None:
    for images, found in batches(numbered(30), 7, CPU, seeded(0)):
        assert images.dtype == torch.float32
        assert images.shape == (7, 1, 2, 2)
        assert torch.equal((images[:, 0, 1, 1] * 255).round().long(), found)
    extremes = ImageSet(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1), torch.arange(2))
    images, _ = next(batches(extremes, 2, CPU))
    assert images.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("cropped", [None, False, True])
def test_batches_come_at_the_stored_size_or_the_networks(shuffled: bool, cropped: bool | None) -> None:
    stored = torch.randint(0, 256, (6, 1, 5, 7), dtype=torch.uint8, generator=seeded(3))
    data = ImageSet(stored, torch.arange(6), 3, (3, 5))
    at_networks_size = cropped if cropped is not None else not shuffled
    for images, found in batches(data, 3, CPU, seeded(0) if shuffled else None, cropped=cropped):
        wanted = stored[found].float() / 255
        wanted = wanted[:, :, 1:4, 1:6] if at_networks_size else wanted
        assert torch.equal(images, wanted.expand(-1, 3, -1, -1))
