from __future__ import annotations

import pytest
import torch

from robustfpd.evaluation.early_stopping import SMALLEST_TRANCHE, fruitless, tranches
from robustfpd.evaluation.ledger import LedgerRow, Outcome


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 130, 1000])
def test_every_image_is_in_one_tranche(count: int) -> None:
    images = torch.arange(count) * 3 + 1
    parts = tranches(images, torch.rand(count), torch.Generator().manual_seed(0))
    assert sorted(torch.cat(parts).tolist()) == images.tolist()
    assert all(len(p) == max(SMALLEST_TRANCHE, -(-count // 10)) for p in parts[:-1])


def test_half_of_the_first_tranche_is_closest_and_the_rest_is_drawn() -> None:
    images, margin = torch.arange(1000), torch.rand(1000, generator=torch.Generator().manual_seed(1))
    nearest = margin.argsort(descending=True).tolist()
    firsts = [tranches(images, margin, torch.Generator().manual_seed(s))[0].tolist() for s in (0, 0, 1)]
    assert firsts[0] == firsts[1]
    assert firsts[0] != firsts[2]
    for first in firsts:
        assert set(nearest[:48]) <= set(first)
        others = [nearest.index(i) for i in first if nearest.index(i) >= 60]
        assert len(others) > 35
        assert 400 < sum(others) / len(others) < 650  # from all over, not from near


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [(["robust"], True), (["robust", "misclassified"], False), (["robust", "failed"], False), (["failed"], False)],
)
def test_the_rest_is_spared_only_after_attacks_that_worked_and_found_nothing(
    outcomes: list[Outcome], expected: bool
) -> None:
    rows = [
        LedgerRow(
            image=i,
            label=0,
            clean_prediction=0,
            attack="a",
            eps=0.1,
            adversarial_prediction=0,
            distance=0.0,
            outcome=o,
            margin=0.0,
        )
        for i, o in enumerate(outcomes)
    ]
    assert fruitless(rows) is expected
