"""The audit: every attack of a suite is run on a random sample of the survivors, which bounds what the others hide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from robustfpd.evaluation.ledger import LedgerRow
from robustfpd.evaluation.record import Proportion, WorstCase
from robustfpd.evaluation.suites import AttackSpec

AUDITED = 1 / 64
"""Part of the survivors that is audited."""
FEWEST = 4
SIGNIFICANCE = 0.05
"""The bound has 95 % confidence."""


def draw_audit(indices: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the survivors on which every attack of the suite is run: one in 64, at least four."""
    count = max(math.ceil(len(indices) * AUDITED), FEWEST)
    return indices[torch.randperm(len(indices), generator=generator)[:count]].sort().values


def worst_case(
    eps: float, robust: Tensor, total: int, audit: Tensor | None, specs: Sequence[AttackSpec],
    rows: Sequence[LedgerRow], positions: Mapping[int, int],
) -> WorstCase:  # fmt: skip
    """Return the survivors at one radius, and how many adversarial examples among them the audit allows to be missed.

    Args:
        eps: the radius.
        robust: which images survived every attack, N.
        total: images that the accuracy refers to.
        audit: indices of the audited images; None if attacks skipped no image, or the evaluation ended early.
        specs: attacks of the suite.
        rows: the ledger.
        positions: index of each image by its number in the ledger.
    """
    proportion = Proportion.of(int(robust.sum()), total)
    if audit is None:
        return WorstCase(eps=eps, robust=proportion)
    attacked: dict[str, set[int]] = {spec.label: set() for spec in specs}
    for row in rows:
        if row.eps == eps and row.attack in attacked:
            attacked[row.attack].add(positions[row.image])
    by_all = set.intersection(*attacked.values())
    survivors = torch.nonzero(robust).flatten().tolist()
    skipped = sum(i not in by_all for i in survivors)
    audited = int(robust[audit].sum())
    skipping = sum(not set(survivors) <= images for images in attacked.values())
    missed = missed_at_most(proportion.count, skipped, audited, SIGNIFICANCE / max(skipping, 1))
    return WorstCase(eps=eps, robust=proportion, audited=audited if skipped else 0, missed_at_most=missed)


def missed_at_most(survivors: int, skipped: int, audited: int, significance: float = SIGNIFICANCE) -> int:
    """Return the most survivors that may have an adversarial example if a random sample has none.

    Args:
        survivors: images of which the sample was drawn.
        skipped: those of them that some attack of the suite was not run on; no others can be missed.
        audited: size of the sample, for which no attack of the suite found an adversarial example.
        significance: probability of such a sample if there were more; with several attacks that skip different images,
            0.05 over their number, because an adversarial example may be found by one of them alone.
    """
    probability, missed = 1.0, 0  # that a sample without replacement has none of the `missed`
    while missed < skipped:
        probability *= max(survivors - missed - audited, 0) / (survivors - missed)
        if probability < significance:
            break
        missed += 1
    return missed
