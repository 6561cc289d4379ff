"""Which images a dear attack goes to first, and when it may stop."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from robustfpd.evaluation.ledger import LedgerRow

TRANCHE = 10
"""Dear attacks go to this part of what stands at a time, 1/10."""
SMALLEST_TRANCHE = 64
"""When none of 64 fall, at most 5 % of such images would (95 % confidence)."""


def tranches(images: Tensor, margin: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Split images into tranches that begin with those closest to falling, and hold as many others drawn at random.

    Closeness is what attacks along gradients saw: where gradients are hidden it means nothing, so half of each tranche
    does not follow it.

    Args:
        images: N indices.
        margin: N, how near each came to falling.
        generator: draws the others.
    """
    near = images[margin.argsort(descending=True, stable=True)].tolist()
    drawn = images[torch.randperm(len(images), generator=generator)].tolist()
    order = dict.fromkeys(image for pair in zip(near, drawn, strict=True) for image in pair)
    size = max(SMALLEST_TRANCHE, math.ceil(len(images) / TRANCHE))
    return list(torch.split(torch.tensor(list(order), dtype=torch.long), size))


def fruitless(rows: Sequence[LedgerRow]) -> bool:
    """Whether an attack worked on all of a tranche and turned none of it, so that the rest may be skipped."""
    return all(row.outcome == "robust" for row in rows)
