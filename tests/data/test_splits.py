from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robustfpd.config import DataConfig
from robustfpd.data.splits import in_file_order, stratified, train_and_test
from robustfpd.errors import InputError

LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=80).map(torch.tensor)


@settings(deadline=None, derandomize=True)
@given(labels=LABELS, fraction=st.floats(0.01, 0.89), seed=st.integers(0, 1000))
def test_a_stratified_split_is_a_partition_with_each_class_in_proportion(
    labels: Tensor, fraction: float, seed: int
) -> None:
    first, second = stratified(labels, fraction, seed, "x")
    assert torch.equal(torch.cat([first, second]).sort().values, torch.arange(len(labels)))
    assert torch.equal(first, first.sort().values)
    for label in set(labels.tolist()):
        members = int((labels == label).sum())
        assert int((labels[second] == label).sum()) == min(members - 1, max(1, round(fraction * members)))


@settings(deadline=None, derandomize=True)
@given(labels=LABELS, percent=st.integers(1, 89))
def test_in_file_order_the_first_train_and_the_next_test(labels: Tensor, percent: int) -> None:
    first, second = in_file_order(labels, percent / 100)
    assert torch.equal(first, first.sort().values)
    assert torch.equal(second, second.sort().values)
    for label in set(labels.tolist()):
        members = torch.nonzero(labels == label).flatten().tolist()
        n = len(members)
        trained, tested = n * (100 - percent) // 100, n * percent // 100  # exact, in whole numbers
        assert [i for i in first.tolist() if labels[i] == label] == members[:trained]
        assert [i for i in second.tolist() if labels[i] == label] == members[trained : trained + tested]


@pytest.mark.parametrize(
    ("count", "fraction", "trained", "tested"),
    [(40, 0.1, 36, 4), (10, 0.1, 9, 1), (31, 0.1, 27, 3), (800, 0.1, 720, 80), (100, 0.05, 95, 5), (119, 0.05, 113, 5)],
)
def test_published_counts(count: int, fraction: float, trained: int, tested: int) -> None:
    train, test = in_file_order(torch.zeros(count, dtype=torch.long), fraction)
    assert train.tolist() == list(range(trained))
    assert test.tolist() == list(range(trained, trained + tested))


@pytest.mark.parametrize("split", ["published", "stratified"])
def test_the_settings_choose_the_split(split: str) -> None:
    labels = torch.arange(60) % 3
    config = DataConfig.model_validate({"split": split, "test_fraction": 0.2, "split_seed": 4})
    train, test = train_and_test(labels, ("a", "b", "c"), config)
    expected = in_file_order(labels, 0.2) if split == "published" else stratified(labels, 0.2, 4, "test")
    assert torch.equal(train, expected[0])
    assert torch.equal(test, expected[1])


@pytest.mark.parametrize(
    ("split", "fraction", "few", "kind"),
    [("published", 0.1, 9, "test"), ("stratified", 0.1, 1, "test"), ("published", 0.89, 1, "training")],
)
def test_a_class_too_small_is_named(split: str, fraction: float, few: int, kind: str) -> None:
    labels = torch.cat([torch.zeros(20), torch.ones(few)]).long()
    config = DataConfig.model_validate({"split": split, "test_fraction": fraction})
    with pytest.raises(InputError, match=f"class 'small' has {few} images, too few for a {kind} image"):
        train_and_test(labels, ("large", "small"), config)
