from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.functional import center_crop

from robustfpd.data import ImageSet
from robustfpd.data.image_set import batches, batches_per_epoch
from robustfpd.data.transforms import centre_crop
from robustfpd.errors import InputError


def numbered(count: int = 6, channels: int = 1, height: int = 5, width: int = 8) -> ImageSet:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=draws)
    return ImageSet(images, torch.arange(count))


def test_an_image_set_is_indexed_scaled_and_hashed() -> None:
    images = torch.arange(24, dtype=torch.uint8).reshape(6, 1, 2, 2) * 11
    data = ImageSet(images, torch.arange(6))
    part = data.take(torch.tensor([4, 1]))
    assert part.labels.tolist() == [4, 1]
    floats, labels = part.floats()
    assert floats.dtype == torch.float32
    assert torch.equal((floats * 255).round().to(torch.uint8), images[[4, 1]])
    assert labels.tolist() == [4, 1]
    assert data.digest() == ImageSet(images.clone(), torch.arange(6)).digest()
    assert data.digest() != ImageSet(images, torch.arange(6).flip(0)).digest()
    assert data.digest() != ImageSet(images.flip(0), torch.arange(6)).digest()


def test_by_default_the_network_sees_the_stored_images() -> None:
    data = numbered(channels=3)
    assert (data.channels, data.size, data.stored_size) == (3, (5, 8), (5, 8))
    assert torch.equal(data.floats()[0], data.images.float() / 255)


def test_the_network_sees_the_centre_crop_and_repeated_grey_channels() -> None:
    stored = numbered().images
    data = ImageSet(stored, torch.arange(6), 3, (3, 4))
    seen, _ = data.floats()
    assert seen.shape == (6, 3, 3, 4)
    for channel in range(3):
        assert torch.equal(seen[:, channel], stored[:, 0, 1:4, 2:6].float() / 255)
    assert torch.equal(data.images, stored)


def test_nested_subsets_and_floats_at_indices() -> None:
    data = ImageSet(numbered().images, torch.arange(6), 3, (3, 4))
    part = data.take(torch.tensor([5, 3, 1, 0])).take(torch.tensor([2, 0]))
    assert part.labels.tolist() == [1, 5]
    assert len(part) == 2
    assert (part.channels, part.size, part.stored_size) == (3, (3, 4), (5, 8))
    assert torch.equal(part.images, data.images[[1, 5]])
    seen, labels = data.floats(torch.tensor([1, 5]))
    assert torch.equal(seen, part.floats()[0])
    assert labels.tolist() == [1, 5]


def test_a_subset_shares_the_stored_images() -> None:
    data = numbered()
    part = data.take(torch.tensor([0]))
    data.images[0] = 7
    assert int(part.images.min()) == 7


def test_the_digest_is_that_of_all_bytes_in_order() -> None:
    data = numbered(2500, 1, 2, 2)
    expected = hashlib.sha256(data.images.numpy().tobytes() + data.labels.numpy().tobytes()).hexdigest()
    assert data.digest() == expected
    order = torch.randperm(2500, generator=torch.Generator().manual_seed(1))
    part = data.take(order)
    assert part.digest() == ImageSet(data.images[order], data.labels[order]).digest()


def test_an_empty_set_has_a_digest() -> None:
    empty = numbered().take(torch.zeros(0, dtype=torch.long))
    assert len(empty) == 0
    assert len(empty.digest()) == 64


@pytest.mark.parametrize(("stored", "channels"), [(3, 1), (3, 2), (1, 2), (2, 3)])
def test_unsupported_channels_are_an_input_error(stored: int, channels: int) -> None:
    with pytest.raises(InputError, match=f"of {stored} channels cannot be converted to {channels}"):
        ImageSet(numbered(channels=stored).images, torch.arange(6), channels)


@pytest.mark.parametrize("size", [(6, 8), (5, 9)])
def test_a_size_larger_than_the_stored_one_is_an_input_error(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"{size[0]}×{size[1]} does not fit into stored images of 5×8"):
        ImageSet(numbered().images, torch.arange(6), None, size)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 2), (4, 5), (5, 7), (8, 6), (8, 9)])
def test_the_centre_crop_equals_torchvisions(size: tuple[int, int]) -> None:
    images = torch.arange(2 * 8 * 9).reshape(2, 1, 8, 9)
    assert torch.equal(centre_crop(images, size), center_crop(images, list(size)))


CPU = torch.device("cpu")


def indexed(count: int) -> ImageSet:
    labels = torch.arange(count)
    return ImageSet(labels.to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous(), labels)


def labels(count: int, size: int, generator: torch.Generator | None = None) -> list[list[int]]:
    return [batch.tolist() for _, batch in batches(indexed(count), size, CPU, generator)]


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
def test_shuffled_batches_are_complete_and_no_image_occurs_twice(count: int, size: int, seed: int) -> None:
    found = labels(count, size, seeded(seed))
    flat = [label for batch in found for label in batch]
    assert len(set(flat)) == len(flat)
    assert len(found) == batches_per_epoch(count, size)
    if count >= size:
        assert {len(batch) for batch in found} == {size}
        assert len(flat) == count - count % size
    else:
        assert sorted(flat) == list(range(count))


def test_every_image_occurs_once_if_the_batch_size_divides_the_count() -> None:
    flat = [label for batch in labels(40, 8, seeded(0)) for label in batch]
    assert sorted(flat) == list(range(40))
    assert flat != list(range(40))


def test_the_generator_determines_the_order() -> None:
    assert labels(40, 8, seeded(0)) == labels(40, 8, seeded(0))
    assert labels(40, 8, seeded(0)) != labels(40, 8, seeded(1))


def test_the_next_epoch_has_another_order() -> None:
    generator = seeded(0)
    assert labels(40, 8, generator) != labels(40, 8, generator)


def test_batches_are_floats_with_labels() -> None:
    for images, found in batches(indexed(30), 7, CPU, seeded(0)):
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
        expected = stored[found].float() / 255
        expected = expected[:, :, 1:4, 1:6] if at_networks_size else expected
        assert torch.equal(images, expected.expand(-1, 3, -1, -1))
