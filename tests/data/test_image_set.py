from __future__ import annotations

import hashlib

import pytest
import torch
from torchvision.transforms.functional import center_crop

from robustfpd.data import ImageSet
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


def test_the_network_sees_what_is_stored_by_default() -> None:
    data = numbered(channels=3)
    assert (data.channels, data.size, data.stored_size) == (3, (5, 8), (5, 8))
    assert torch.equal(data.floats()[0], data.images.float() / 255)


def test_the_network_sees_the_centre_and_grey_pictures_three_times() -> None:
    stored = numbered().images
    data = ImageSet(stored, torch.arange(6), 3, (3, 4))
    seen, _ = data.floats()
    assert seen.shape == (6, 3, 3, 4)
    for channel in range(3):
        assert torch.equal(seen[:, channel], stored[:, 0, 1:4, 2:6].float() / 255)
    assert torch.equal(data.images, stored)


def test_parts_of_parts_and_chosen_floats() -> None:
    data = ImageSet(numbered().images, torch.arange(6), 3, (3, 4))
    part = data.take(torch.tensor([5, 3, 1, 0])).take(torch.tensor([2, 0]))
    assert part.labels.tolist() == [1, 5]
    assert len(part) == 2
    assert (part.channels, part.size, part.stored_size) == (3, (3, 4), (5, 8))
    assert torch.equal(part.images, data.images[[1, 5]])
    seen, labels = data.floats(torch.tensor([1, 5]))
    assert torch.equal(seen, part.floats()[0])
    assert labels.tolist() == [1, 5]


def test_a_part_shares_the_stored_images() -> None:
    data = numbered()
    part = data.take(torch.tensor([0]))
    data.images[0] = 7
    assert int(part.images.min()) == 7


def test_the_digest_is_that_of_all_bytes_in_order() -> None:
    data = numbered(2500, 1, 2, 2)
    whole = hashlib.sha256(data.images.numpy().tobytes() + data.labels.numpy().tobytes()).hexdigest()
    assert data.digest() == whole
    order = torch.randperm(2500, generator=torch.Generator().manual_seed(1))
    part = data.take(order)
    assert part.digest() == ImageSet(data.images[order], data.labels[order]).digest()


def test_an_empty_set_has_a_digest() -> None:
    empty = numbered().take(torch.zeros(0, dtype=torch.long))
    assert len(empty) == 0
    assert len(empty.digest()) == 64


@pytest.mark.parametrize(("stored", "asked"), [(3, 1), (3, 2), (1, 2), (2, 3)])
def test_channels_that_cannot_be_had_are_an_input_error(stored: int, asked: int) -> None:
    with pytest.raises(InputError, match=f"of {stored} channels cannot be shown as {asked}"):
        ImageSet(numbered(channels=stored).images, torch.arange(6), asked)


@pytest.mark.parametrize("size", [(6, 8), (5, 9)])
def test_a_size_larger_than_the_stored_one_is_an_input_error(size: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"{size[0]}×{size[1]} does not fit into stored images of 5×8"):
        ImageSet(numbered().images, torch.arange(6), None, size)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (3, 2), (4, 5), (5, 7), (8, 6), (8, 9)])
def test_the_centre_is_torchvisions(size: tuple[int, int]) -> None:
    images = torch.arange(2 * 8 * 9).reshape(2, 1, 8, 9)
    assert torch.equal(centre_crop(images, size), center_crop(images, list(size)))
