"""The evaluation loop: clean images → checks → attacks on the survivors → checks of the results → record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from robustfpd.evaluation.ledger import CLEAN, Ledger, LedgerRow
from robustfpd.evaluation.record import AttackResult, Check, EvaluationRecord, Proportion, Verdict, WorstCase
from robustfpd.evaluation.suites import AttackSpec, SuiteContext
from robustfpd.provenance import environment, weights_sha256
from robustfpd.rng import generator

SearchPrecision = Literal["fp32", "bf16"]
TRANCHE = 10
"""An expensive attack takes this part of the images at a time, 1/10."""
SMALLEST_TRANCHE = 64
"""When an attack finds no adversarial example for 64 images, it would for at most 5 % of such (95 % confidence)."""


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
        self.block_size = block_size(len(runner.images), given)
        self.margins = torch.full((len(runner.images),), -torch.inf)
        """Largest margin that an attack reached on each image inside its ball, N."""
        self.minimal_rows: dict[str, dict[int, LedgerRow]] = {}
        """Rows of attacks that search for the smallest perturbation, by attack and position of the image."""

    def run(self, input_checks: list[Check], forward: int) -> EvaluationRecord:
        """Evaluate, and return the record.

        Args:
            input_checks: outcomes of the checks that were made already.
            forward: images that these and other preparations sent forward.
        """
        settings, runner, count = self.settings, self.runner, len(self.runner.images)
        correct = self._classify()
        views, forward_for_views = self._set_views()
        context = checks.CheckContext(runner, correct, settings.radii, suites.suite(settings.suite).probes)
        # What follows from the checks must be the same on all ranks, though their rounding may differ.
        made = self.group.broadcast(input_checks + checks.before_attacks(context))
        suite_context = SuiteContext(runner.norm, tuple(views), tuple(self.surrogates), checks.is_random(made))
        specs = suites.attack_specs(settings.suite, suite_context)
        stop_early = not settings.every_attack and all(c.outcome in ("passed", "skipped") for c in made)

        survivors, results, worst_case = correct.clone(), list[AttackResult](), list[WorstCase]()
        for eps in settings.radii:
            for spec in specs:
                number, total = len(results) + 1, len(settings.radii) * len(specs)
                self.observer.on_attack(EvaluationProgress(spec.label, eps, number, total, int(survivors.sum())))
                indices = torch.nonzero(correct if settings.every_attack else survivors).flatten()
                result, misclassified = self._attack(spec, eps, indices, stop_early=stop_early)
                survivors[misclassified] = False
                results.append(result)
                if self.gallery is not None:
                    self.gallery.save(final=eps == settings.radii[-1])
            worst_case.append(WorstCase(eps=eps, robust=Proportion.of(int(survivors.sum()), count)))

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
        self, spec: AttackSpec, eps: float, indices: Tensor, *, stop_early: bool
    ) -> tuple[AttackResult, Tensor]:
        """Run one attack at one radius; return its result and the indices of the images that it misclassified."""
        minimal_rows = self.minimal_rows.setdefault(spec.label, {})
        known = torch.tensor([int(i) in minimal_rows for i in indices], dtype=torch.bool)
        rows = self._judge_again(spec, eps, indices[known]) if bool(known.any()) else []
        tranches = [indices[~known]]
        if spec.early_stopping and stop_early:
            draws = generator(self.runner.seed, "tranches", spec.label, repr(eps))
            tranches = split_tranches(tranches[0], self.margins[tranches[0]], draws)
        for tranche in tranches:
            tranche_rows = self._attack_blocks(spec, eps, tranche)
            rows += tranche_rows
            if found_nothing(tranche_rows):
                break
        positions = self.runner.data.positions
        misclassified = [positions[row.image] for row in rows if row.outcome == "misclassified"]
        result = self._result(spec, eps, rows, skipped=len(indices) - len(rows))
        return result, torch.tensor(misclassified, dtype=torch.long)

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


def split_tranches(indices: Tensor, margins: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Split images into tranches: half of each has the largest margins left, half is drawn at random.

    Margins come from attacks with gradients and mean nothing if gradients are masked, hence the random half.
    `margins` are the largest that attacks reached on each image.
    """
    by_margin = indices[margins.argsort(descending=True, stable=True)].tolist()
    drawn = indices[torch.randperm(len(indices), generator=generator)].tolist()
    order = dict.fromkeys(image for pair in zip(by_margin, drawn, strict=True) for image in pair)
    size = max(SMALLEST_TRANCHE, math.ceil(len(indices) / TRANCHE))
    return list(torch.split(torch.tensor(list(order), dtype=torch.long), size))


def found_nothing(rows: Sequence[LedgerRow]) -> bool:
    """Return whether an attack worked on all images and found no adversarial example, so that others may be skipped."""
    return all(row.outcome == "robust" for row in rows)


def _median(values: Sequence[float]) -> float | None:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5)) if values else None
