"""The evaluation loop: clean images → checks → attacks on the survivors → checks of the results → record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.attacks import adaptive
from robustfpd.attacks.adaptive import View
from robustfpd.attacks.base import reproducible
from robustfpd.config import Norm
from robustfpd.distributed import ProcessGroup, shared_errors
from robustfpd.errors import InputError
from robustfpd.evaluation import checks, suites
from robustfpd.evaluation.attack_runner import TOLERANCE, AttackOutcome, AttackRunner, fills_batches, forward_passes
from robustfpd.evaluation.gallery import Gallery
from robustfpd.evaluation.inputs import block_size
from robustfpd.evaluation.ledger import CLEAN, Ledger, LedgerRow, Outcome
from robustfpd.evaluation.record import AttackResult, Check, EvaluationRecord, Proportion, Verdict, WorstCase
from robustfpd.evaluation.suites import AttackSpec, SuiteContext
from robustfpd.provenance import environment, weights_sha256
from robustfpd.rng import generator

SearchPrecision = Literal["fp32", "bf16"]
SMALLEST_TRANCHE = 8
"""Fewest images with the largest margins that an attack with a share takes."""
AUDIT = 64
"""One survivor in 64 is drawn for the audit, on which every attack of the suite is run."""
SMALLEST_AUDIT = 4
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class EvaluationProgress:
    """The attack that an evaluation runs next."""

    attack: str
    eps: float
    number: int
    """Number of the attack, counted from 1."""
    total: int
    survivors: int
    """Images for which no adversarial example was found yet."""


@dataclass
class EvaluationObserver:
    """Callbacks of a display; they do nothing unless set."""

    on_attack: Callable[[EvaluationProgress], None] = field(default=lambda progress: None)


@dataclass(frozen=True)
class EvaluationSettings:
    """Arguments of `evaluate` that the loop and the record need."""

    suite: str
    radii: tuple[float, ...]
    """Smallest first."""
    norm: Norm
    seed: int
    batch_size: int | Literal["auto"]
    search_precision: SearchPrecision
    every_attack: bool
    model_name: str
    class_names: tuple[str, ...]
    sha256: str = ""
    """Of all settings that decide the result; set once the classifier was examined."""


class EvaluationLoop:
    """State of one evaluation. Batches that the ledger holds are not attacked again."""

    def __init__(
        self, settings: EvaluationSettings, runner: AttackRunner, surrogates: Mapping[str, nn.Module], ledger: Ledger,
        group: ProcessGroup, observer: EvaluationObserver, gallery: Gallery | None,
    ) -> None:  # fmt: skip
        self.settings, self.runner, self.surrogates, self.ledger = settings, runner, surrogates, ledger
        self.group, self.observer, self.gallery = group, observer, gallery
        # Blocks and batches are the same on all ranks, though a rank may halve its runner's batch size later.
        self.batch_size = runner.batch_size
        given = None if settings.batch_size == "auto" else settings.batch_size
        fixed = suites.suite(settings.suite).batch_size  # then a block is one batch, as in the library
        self.block_size = block_size(len(runner.images), given) if fixed is None else given or fixed
        self.margins = torch.full((len(runner.images),), -torch.inf)
        """Largest margin that an attack reached on each image inside its ball, N; the nearest images are attacked
        first."""
        self.minimal_rows: dict[str, dict[int, LedgerRow]] = {}
        """Rows of attacks that search for the smallest perturbation, by attack and position of the image."""

    def run(self, input_checks: list[Check], forward: int) -> EvaluationRecord:
        """Evaluate, and return the record.

        Args:
            input_checks: outcomes of the checks that were made already.
            forward: images that these and other preparations sent forward.
        """
        settings, runner, count = self.settings, self.runner, len(self.runner.images)
        attacked_radii = tuple(eps for eps in settings.radii if eps > 0)
        correct = self._classify()
        views, forward_for_views = self._set_views()
        context = checks.CheckContext(runner, correct, attacked_radii, suites.suite(settings.suite).probes)
        # What follows from the checks must be the same on all ranks, though their rounding may differ.
        made = self.group.broadcast(input_checks + checks.before_attacks(context))
        suite_context = SuiteContext(
            runner.norm, tuple(views), tuple(self.surrogates), checks.is_random(made), settings.seed
        )
        specs = suites.attack_specs(settings.suite, suite_context)
        stop_early = not settings.every_attack and all(c.outcome in ("passed", "skipped") for c in made)

        survivors, results, worst_case = correct.clone(), list[AttackResult](), list[WorstCase]()
        for eps in settings.radii:
            audit: Tensor | None = None
            attacked_by_all = survivors.clone()
            for spec in specs if eps > 0 else ():
                number, total = len(results) + 1, len(attacked_radii) * len(specs)
                self.observer.on_attack(EvaluationProgress(spec.label, eps, number, total, int(survivors.sum())))
                indices = torch.nonzero(correct if settings.every_attack else survivors).flatten()
                if stop_early and spec.share < 1 and audit is None:
                    audit = draw_audit(indices, generator(settings.seed, "audit", repr(eps)))
                result, attacked, misclassified = self._attack(spec, eps, indices, audit)
                survivors[misclassified] = False
                attacked_by_all &= attacked
                results.append(result)
                if self.gallery is not None:
                    self.gallery.save(final=eps == settings.radii[-1])
            worst_case.append(worst_case_of(eps, survivors, attacked_by_all, audit))

        findings = checks.AttackFindings(specs, tuple(self.ledger.rows), results, survivors, self.margins)
        made += checks.after_attacks(context, findings)
        if self.gallery is not None:
            self.gallery.finish(runner.view_module(suite_context.best_view), survivors)
        check_forward, check_backward = runner.check_passes
        counter = context.classifier  # the checks' own, beside those of the views
        return EvaluationRecord(
            model_name=settings.model_name, suite=settings.suite, norm=settings.norm, seed=settings.seed,
            batch_size=min(self.group.gather(runner.batch_size)), batch_size_auto=settings.batch_size == "auto",
            search_precision=settings.search_precision, every_attack=settings.every_attack,
            clean=Proportion.of(int(correct.sum()), count), worst_case=tuple(worst_case), attacks=tuple(results),
            ledger=tuple(self.ledger.rows), data_sha256=runner.data.digest(), verdict=Verdict.of(made),
            weights_sha256=weights_sha256(runner.classifier), environment=environment(runner.device),
            surrogates=tuple(self.surrogates), class_names=settings.class_names, settings_sha256=settings.sha256,
            check_forward_passes=forward + forward_for_views + check_forward + counter.forward_passes,
            check_backward_passes=check_backward + counter.backward_passes,
        )  # fmt: skip

    def _classify(self) -> Tensor:
        """Classify the clean images; return which are classified correctly, N."""
        runner = self.runner
        blocks = torch.split(torch.arange(len(runner.images)), self.block_size)
        for indices, outcome in self._outcomes(CLEAN, 0.0, blocks, runner.classify):
            runner.clean_predictions[indices] = torch.tensor([r.adversarial_prediction for r in outcome.rows])
        return runner.clean_predictions == runner.labels

    def _set_views(self) -> tuple[Mapping[str, View], int]:
        """Set the runner's views; return those of the classifier, and the images sent forward to find them."""
        runner = self.runner
        with forward_passes(runner.classifier) as passes, reproducible(generator(runner.seed, "views")):
            views = adaptive.adaptive_views(runner.classifier, runner.images[:4].to(runner.device))
        taken = sorted({*views} & {*self.surrogates})
        with shared_errors():
            if taken:
                raise InputError(f"a surrogate cannot be called {taken[0]!r}: a view of the classifier has that name")
        runner.set_views(views | {name: View(m, surrogate=True) for name, m in self.surrogates.items()})
        return views, passes()

    def _attack(
        self, spec: AttackSpec, eps: float, indices: Tensor, audit: Tensor | None
    ) -> tuple[AttackResult, Tensor, Tensor]:  # fmt: skip
        """Run one attack at one radius.

        With an audit sample, it attacks its share of the images, those with the largest margins, and the sample. It
        stops if it finds no adversarial example for the farther half of the former, nor for the sample, where it goes
        on with all images; otherwise it goes on with twice as many.

        Returns:
            Its result, which images it attacked, N booleans, and the indices of those that it misclassified.
        """
        minimal_rows = self.minimal_rows.setdefault(spec.label, {})
        known = torch.tensor([int(i) in minimal_rows for i in indices], dtype=torch.bool)
        rows = self._judge_again(spec, eps, indices[known]) if bool(known.any()) else []
        order = self.margins[indices[~known]].argsort(descending=True, stable=True)
        remaining = indices[~known][order]
        sample = torch.empty(0, dtype=torch.long) if audit is None else audit[torch.isin(audit, remaining)]
        count = len(remaining)
        if audit is not None:
            count = max(math.ceil(spec.share * count), min(SMALLEST_TRANCHE, count))
        while len(remaining):
            tranche = torch.cat([remaining[:count], sample[~torch.isin(sample, remaining[:count])]])
            tranche_rows = self._attack_blocks(spec, eps, tranche.sort().values)
            rows += tranche_rows
            outcomes = {self.runner.data.positions[row.image]: row.outcome for row in tranche_rows}
            if found_nothing(outcomes[i] for i in [*tranche[count // 2 :].tolist(), *sample.tolist()]):
                break
            everywhere = not found_nothing(outcomes[i] for i in sample.tolist())
            remaining = remaining[~torch.isin(remaining, tranche)]
            count, sample = len(remaining) if everywhere else 2 * count, sample[:0]
        positions = self.runner.data.positions
        attacked = torch.zeros(len(self.margins), dtype=torch.bool)
        attacked[[positions[row.image] for row in rows]] = True
        misclassified = [positions[row.image] for row in rows if row.outcome == "misclassified"]
        result = self._result(spec, eps, rows, skipped=len(indices) - len(rows))
        return result, attacked, torch.tensor(misclassified, dtype=torch.long)

    def _attack_blocks(self, spec: AttackSpec, eps: float, indices: Tensor) -> list[LedgerRow]:
        """Run one attack on images, a block or batch at a time."""
        runner, rows = self.runner, list[LedgerRow]()
        size = self.block_size if fills_batches(spec) else self.batch_size
        blocks = torch.split(indices, self.block_size) if len(indices) else ()
        batches = [batch for block in blocks for batch in torch.split(block, size)]
        for batch, outcome in self._outcomes(spec.label, eps, batches, lambda batch: runner.run(spec, eps, batch)):
            if self.gallery is not None:
                self.gallery.add(spec, batch, outcome)
            # Points outside the ball have margins of a larger one.
            limit = eps * (1 + TOLERANCE) + TOLERANCE
            valid = [r.outcome != "failed" and r.distance <= limit for r in outcome.rows]
            margins = [r.margin if v else -torch.inf for r, v in zip(outcome.rows, valid, strict=True)]
            self.margins[batch] = torch.maximum(self.margins[batch], torch.tensor(margins))
            if attacks.get(spec.attack).minimal:
                by_index = zip(batch.tolist(), outcome.rows, strict=True)
                self.minimal_rows[spec.label] |= {i: r for i, r in by_index if r.outcome != "failed"}
            rows += outcome.rows
        return rows

    def _judge_again(self, spec: AttackSpec, eps: float, indices: Tensor) -> list[LedgerRow]:
        """Judge at this radius the smallest perturbations that an attack found at a smaller radius."""

        def judge(indices: Tensor) -> AttackOutcome:
            rows = []
            for i in indices.tolist():
                row = self.minimal_rows[spec.label][i]
                misclassified = row.adversarial_prediction != row.label and row.distance <= eps * (1 + TOLERANCE)
                changes: dict[str, Any] = {"eps": eps, "outcome": "misclassified" if misclassified else "robust"}
                rows.append(row.model_copy(update={**changes, "queries": 0, "gradients": 0, "seconds": 0.0}))
            return AttackOutcome(rows)

        ((_, outcome),) = self._outcomes(spec.label, eps, [indices], judge)
        if self.gallery is not None:
            self.gallery.add(spec, indices, outcome)
        return outcome.rows

    def _outcomes(
        self, label: str, eps: float, batches: Sequence[Tensor], run: Callable[[Tensor], AttackOutcome]
    ) -> Iterator[tuple[Tensor, AttackOutcome]]:
        """Yield the outcome of each batch, in order: from the ledger, or from `run`, which the ranks call in turn."""
        group, ledger = self.group, self.ledger
        replayed = group.run_on_main(lambda: self._replay(label, eps, batches))
        for batch, rows in zip(batches, replayed, strict=False):
            if not group.is_main:
                ledger.add(rows)
            yield batch, AttackOutcome(rows)
        remaining = batches[len(replayed) :]
        for start in range(0, len(remaining), group.world_size):
            turn = remaining[start : start + group.world_size]
            with shared_errors():
                own = run(turn[group.rank]) if group.rank < len(turn) else AttackOutcome([])
            for rank, (batch, rows) in enumerate(zip(turn, group.gather(own.rows), strict=False)):
                with shared_errors():
                    ledger.add(rows)
                yield batch, own if rank == group.rank else AttackOutcome(rows)

    def _replay(self, label: str, eps: float, batches: Sequence[Tensor]) -> list[list[LedgerRow]]:
        """Return the rows of the first batches, as far as the ledger has them."""
        replayed = []
        for batch in batches:
            rows = self.ledger.replay(label, eps, self.runner.data.ids[batch].tolist())
            if rows is None:
                break
            replayed.append(rows)
        return replayed

    def _result(self, spec: AttackSpec, eps: float, rows: Sequence[LedgerRow], skipped: int) -> AttackResult:
        attack, total = attacks.get(spec.attack), len(self.runner.labels)
        misclassified = [r for r in rows if r.outcome == "misclassified"]
        queries = [r.queries for r in misclassified] if attack.access != "gradients" else []
        distances = [r.distance for r in rows if r.distance > 0 and r.outcome != "failed"] if attack.minimal else []
        alone = Proportion.of(len(rows) - len(misclassified), total) if self.settings.every_attack else None
        return AttackResult(
            attack=spec.label, eps=eps, attacked=len(rows), misclassified=len(misclassified), accuracy=alone,
            seconds=sum(r.seconds for r in rows), failed=sum(r.outcome == "failed" for r in rows), skipped=skipped,
            forward_passes=sum(r.queries for r in rows), backward_passes=sum(r.gradients for r in rows),
            median_queries=_median(queries), median_distance=_median(distances),
        )  # fmt: skip


def draw_audit(indices: Tensor, generator: torch.Generator) -> Tensor:
    """Draw the survivors on which every attack of the suite is run: one in 64, at least four."""
    count = max(math.ceil(len(indices) / AUDIT), SMALLEST_AUDIT)
    return indices[torch.randperm(len(indices), generator=generator)[:count]].sort().values


def found_nothing(outcomes: Iterable[Outcome]) -> bool:
    """Return whether an attack worked on all images and found no adversarial example, so that others may be skipped."""
    return all(outcome == "robust" for outcome in outcomes)


def worst_case_of(eps: float, survivors: Tensor, attacked_by_all: Tensor, audit: Tensor | None) -> WorstCase:
    """Return the images that survive, N booleans, and how many adversarial examples the audit allows to be missed."""
    robust, missed, audited = Proportion.of(int(survivors.sum()), len(survivors)), 0, 0
    if audit is not None:
        audited = int(survivors[audit].sum())
        missed = missed_at_most(robust.count, int((survivors & ~attacked_by_all).sum()), audited)
    return WorstCase(eps=eps, robust=robust, audited=audited, missed_at_most=missed)


def missed_at_most(survivors: int, skipped: int, audited: int) -> int:
    """Return the most survivors with an adversarial example of which a random sample has none, at 95 % confidence.

    Args:
        survivors: images of which the sample was drawn.
        skipped: those of them that some attack of the suite was not run on; no others can be missed.
        audited: size of the sample, which has no adversarial example under any attack of the suite.
    """
    probability, missed = 1.0, 0  # that a sample without replacement has none of the `missed`
    while missed < skipped:
        probability *= max(survivors - missed - audited, 0) / (survivors - missed)
        if probability < SIGNIFICANCE:
            break
        missed += 1
    return missed


def _median(values: Sequence[float]) -> float | None:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5)) if values else None
