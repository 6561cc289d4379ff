"""Results of attacks, also of those that an evaluation left out when it ended early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from robustfpd import attacks
from robustfpd.evaluation.attack_runner import TOLERANCE, AttackRunner
from robustfpd.evaluation.checks import CheckContext
from robustfpd.evaluation.ledger import CLEAN, LedgerRow
from robustfpd.evaluation.record import AttackResult, Check, Proportion
from robustfpd.evaluation.suites import AttackSpec


@dataclass
class LoopState:
    """What an evaluation has done once its attacks begin."""

    context: CheckContext
    correct: Tensor
    """Which images are classified correctly, N."""
    specs: list[AttackSpec]
    made: list[Check]
    """Checks before the attacks."""
    best_view: str
    forward: int
    """Images that preparations sent forward."""
    results: list[AttackResult] = field(default_factory=list)
    """Of the attacks that were run on all their images."""


def attack_result(
    spec: AttackSpec, eps: float, rows: Sequence[LedgerRow], *, total: int, every_attack: bool, skipped: int = 0,
    not_attacked: int = 0,
) -> AttackResult:  # fmt: skip
    """Return the result of one attack at one radius from its rows in the ledger.

    Args:
        spec: the attack.
        eps: the radius.
        rows: one for each image that it was run on.
        total: images of the evaluation.
        every_attack: attacks are run on all correctly classified images.
        skipped: survivors left out because others have larger margins.
        not_attacked: survivors left out because the evaluation ended early.
    """
    attack = attacks.get(spec.attack)
    misclassified = [r for r in rows if r.outcome == "misclassified"]
    queries = [r.queries for r in misclassified] if attack.access != "gradients" else []
    distances = [r.distance for r in rows if r.distance > 0 and r.outcome != "failed"] if attack.minimal else []
    alone = Proportion.of(len(rows) - len(misclassified), total) if every_attack and not not_attacked else None
    return AttackResult(
        attack=spec.label, eps=eps, attacked=len(rows), misclassified=len(misclassified), accuracy=alone,
        seconds=sum(r.seconds for r in rows), failed=sum(r.outcome == "failed" for r in rows), skipped=skipped,
        forward_passes=sum(r.queries for r in rows), backward_passes=sum(r.gradients for r in rows),
        median_queries=_median(queries), median_distance=_median(distances), not_attacked=not_attacked,
    )  # fmt: skip


def judged_at(row: LedgerRow, eps: float) -> LedgerRow:
    """Return the row of a smallest perturbation at another radius, where it takes no passes."""
    misclassified = row.adversarial_prediction != row.label and row.distance <= eps * (1 + TOLERANCE)
    changes = {"eps": eps, "outcome": "misclassified" if misclassified else "robust"}
    return row.model_copy(update={**changes, "queries": 0, "gradients": 0, "seconds": 0.0})


def left_out(
    state: LoopState, radii: Sequence[float], rows: Sequence[LedgerRow], *, every_attack: bool
) -> list[AttackResult]:
    """Return results of the attacks that were not run, or on a part of their images; `rows` is the whole ledger."""
    planned = [(eps, spec) for eps in radii if eps > 0 for spec in state.specs][len(state.results) :]
    runner, results = state.context.runner, list[AttackResult]()
    images = int((state.correct if every_attack else survivors(rows, runner, state.correct, torch.inf)).sum())
    for eps, spec in planned:
        own = [row for row in rows if (row.attack, row.eps) == (spec.label, eps)]
        done = len(own) if every_attack else sum(row.outcome != "misclassified" for row in own)
        results.append(
            attack_result(
                spec, eps, own, total=len(runner.images), every_attack=every_attack, not_attacked=images - done
            )
        )
    return results


def survivors(rows: Sequence[LedgerRow], runner: AttackRunner, correct: Tensor, eps: float) -> Tensor:
    """Return which correctly classified images no attack made misclassified up to a radius, N."""
    robust, positions = correct.clone(), runner.data.positions
    lost = [positions[r.image] for r in rows if r.outcome == "misclassified" and r.attack != CLEAN and r.eps <= eps]
    robust[torch.tensor(lost, dtype=torch.long)] = False
    return robust


def _median(values: Sequence[float]) -> float | None:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5)) if values else None
