from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from robustfpd.errors import InputError
from robustfpd.evaluation import diagnose, evaluate
from robustfpd.evaluation.inputs import gather

COUNT = 100


class _Numbered(Dataset[tuple[Tensor, int]]):
    """Image i has the level i / 255; counts what is read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.read.append(i)
        return torch.full((1, 4, 4), i / 255), i % 3


class _Stream(IterableDataset[tuple[Tensor, int]]):
    def __init__(self) -> None:
        self.numbered = _Numbered()

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self.numbered[i] for i in range(COUNT))


def _levels(images: Tensor) -> list[int]:
    return [round(255 * float(x)) for x in images[:, 0, 0, 0]]


def _arrays() -> tuple[Tensor, Tensor]:
    numbers = torch.arange(COUNT)
    return (numbers / 255).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4), numbers % 3


@pytest.mark.parametrize("shuffle", [False, True])
def test_of_a_loader_the_images_drawn_by_the_seed_are_read(shuffle: bool) -> None:
    dataset = _Numbered()
    gathered = gather(DataLoader(dataset, 8, shuffle=shuffle), 10, 3)
    assert sorted(dataset.read) == gathered.ids.tolist() == _levels(gathered.images)
    assert gathered.labels.tolist() == [i % 3 for i in dataset.read]
    assert len(dataset.read) == 10
    assert gathered.ids.tolist() == gather(_arrays(), 10, 3).ids.tolist()  # as of tensors
    assert gathered.ids.tolist() != gather(DataLoader(_Numbered(), 8), 10, 4).ids.tolist()


@pytest.mark.parametrize("num_images", [None, COUNT, 10 * COUNT])
def test_a_shuffled_loader_is_read_in_the_order_of_its_data_set(num_images: int | None) -> None:
    gathered = gather(DataLoader(_Numbered(), 8, shuffle=True), num_images, 0)
    assert gathered.ids.tolist() == _levels(gathered.images) == list(range(COUNT))


def test_a_sampler_is_respected() -> None:
    dataset, only = _Numbered(), list(range(50, 90, 2))
    gathered = gather(DataLoader(dataset, 8, sampler=only), 5, 0)
    assert len(dataset.read) == 5
    assert _levels(gathered.images) == [only[i] for i in gathered.ids.tolist()]
    assert gather(DataLoader(dataset, 8, sampler=only, drop_last=True), None, 0).ids.tolist() == list(range(16))
    for sampler in (SubsetRandomSampler(only), WeightedRandomSampler([i in only for i in range(COUNT)], 30)):
        found = _levels(gather(DataLoader(dataset, 8, sampler=sampler), 7, 0).images)
        assert set(found) <= set(only)
        assert len(found) == 7


class _Own(DataLoader[Any]):
    """Moves batches to a device, say."""

    def __iter__(self) -> Any:
        yield from super().__iter__()


@pytest.mark.parametrize(
    "make",
    [
        lambda: (s := _Stream(), s.numbered, DataLoader(s, 8))[1:],
        lambda: (d := _Numbered(), d, DataLoader(d, batch_sampler=BatchSampler(SequentialSampler(d), 8, False)))[1:],
        lambda: (d := _Numbered(), d, _Own(d, 8))[1:],
        lambda: (d := _Numbered(), d, (b for b in DataLoader(d, 8)))[1:],
        lambda: (d := _Numbered(), d, map(tuple, DataLoader(d, 8)))[1:],
    ],
    ids=["iterable", "batch sampler", "subclass", "generator", "map"],
)
def test_of_others_the_first_images_are_read(make: Any) -> None:
    dataset, loader = make()
    gathered = gather(loader, 10, 3)
    assert gathered.ids.tolist() == _levels(gathered.images) == list(range(10))
    assert len(dataset.read) in (16, 24)  # whole batches, a generator may be one ahead


def test_a_list_of_batches_is_drawn_from_as_its_images_are() -> None:
    images, labels = _arrays()
    batches = list(zip(torch.split(images, 7), torch.split(labels, 7), strict=True))
    assert gather(batches, 10, 3).ids.tolist() == gather((images, labels), 10, 3).ids.tolist()
    assert len(batches) == 15  # it is as it was
    assert gather(batches, None, 3).images.equal(images)


def test_workers_and_collation_of_the_loader_are_used() -> None:
    def collate(items: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        return torch.stack([1 - x for x, _ in items]), torch.tensor([label for _, label in items])

    gathered = gather(DataLoader(_Numbered(), 8, collate_fn=collate), 3, 0)
    assert _levels(1 - gathered.images) == gathered.ids.tolist()


def test_batches_of_different_types_are_refused() -> None:
    labels = torch.zeros(2, dtype=torch.long)
    batches = [(torch.zeros(2, 1, 4, 4), labels), (torch.zeros(2, 1, 4, 4).double(), labels)]
    with pytest.raises(InputError, match=r"different shapes or types: torch.float32 \(1, 4, 4\) and torch.float64"):
        gather(batches, None, 0)
    with pytest.raises(InputError, match="found batches of tuple"):
        gather([(torch.zeros(2, 1, 4, 4), torch.tensor(1))], None, 0)


def test_the_ledger_has_the_index_in_the_data_set() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    loader, images = DataLoader(_Numbered(), 8, shuffle=True), _arrays()
    by_loader, by_tensors = (
        evaluate(net, data, suite="first-look", eps=0.01, num_images=12, seed=5) for data in (loader, images)
    )
    assert [r.image for r in by_loader.ledger] == [r.image for r in by_tensors.ledger]
    assert by_loader.data_sha256 == by_tensors.data_sha256


def test_the_doctor_reads_what_it_needs() -> None:
    dataset = _Numbered()
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    by_loader, by_tensors = diagnose(net, DataLoader(dataset, 8), num_images=9), diagnose(net, _arrays(), num_images=9)
    assert len(dataset.read) == 9
    assert [c.name for c in by_loader] == [c.name for c in by_tensors]


def test_a_tensor_dataset_is_read_once() -> None:
    images, labels = _arrays()
    gathered = gather(DataLoader(TensorDataset(images, labels), 32), None, 0)
    assert torch.equal(gathered.images, images)
    assert torch.equal(gathered.labels, labels)
