from __future__ import annotations

import pytest
import torch
from scipy.stats import hypergeom

from robustfpd.evaluation.audit import draw_audit, missed_at_most, worst_case
from robustfpd.evaluation.ledger import LedgerRow
from robustfpd.evaluation.record import Proportion
from robustfpd.evaluation.suites import AttackSpec


@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 3), (64, 4), (256, 4), (500, 8), (1000, 16)])
def test_the_audit_is_a_random_sample(count: int, size: int) -> None:
    images = torch.arange(count) * 3 + 1
    samples = [draw_audit(images, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 0, 1)]
    assert samples[0] == samples[1]
    assert count <= 3 or samples[0] != samples[2]
    for sample in samples:
        assert len(sample) == len(set(sample)) == size
        assert set(sample) <= set(images.tolist())


@pytest.mark.parametrize(("survivors", "skipped", "audited"), [(450, 400, 8), (100, 100, 10), (40, 3, 4), (20, 0, 4)])
def test_the_audit_bounds_what_is_missed(survivors: int, skipped: int, audited: int) -> None:
    missed = missed_at_most(survivors, skipped, audited)
    assert 0 <= missed <= skipped
    assert hypergeom.pmf(0, survivors, missed, audited) >= 0.05  # as many would be overlooked with 5 % probability
    assert missed == skipped or hypergeom.pmf(0, survivors, missed + 1, audited) < 0.05


def test_the_interval_includes_what_the_audit_allows_to_be_missed() -> None:
    robust, positions = torch.ones(100, dtype=torch.bool), {i: i for i in range(100)}
    robust[0] = False
    specs, audit = [AttackSpec("PGD", "pgd"), AttackSpec("Square", "square", share=1 / 8)], torch.arange(0, 100, 10)

    def rows(label: str, images: range) -> list[LedgerRow]:
        return [
            LedgerRow(
                image=i, label=0, clean_prediction=0, attack=label, eps=0.1, adversarial_prediction=0, distance=0.1,
                outcome="robust", margin=-1.0,
            )
            for i in images
        ]  # fmt: skip

    everywhere, few = rows("PGD", range(100)), rows("Square", range(0, 100, 10))
    worst = worst_case(0.1, robust, 100, audit, specs, [*everywhere, *few], positions)
    assert (worst.robust.count, worst.audited, worst.missed_at_most) == (99, 9, missed_at_most(99, 90, 9))
    assert worst.interval == (Proportion.of(99 - worst.missed_at_most, 100).low, worst.robust.high)
    on_all = worst_case(0.1, robust, 100, audit, specs, [*everywhere, *rows("Square", range(100))], positions)
    assert (on_all.audited, on_all.missed_at_most, on_all.interval) == (0, 0, (worst.robust.low, worst.robust.high))
    assert worst_case(0.1, robust, 100, None, specs, [], positions).missed_at_most == 0
