"""The evaluation loop: clean images → checks → attacks on the survivors → checks of the results → record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
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
from robustfpd.evaluation.audit import draw_audit, worst_case
from robustfpd.evaluation.gallery import Gallery
from robustfpd.evaluation.inputs import CPU_BATCH_SIZE, block_size
from robustfpd.evaluation.ledger import CLEAN, Ledger, LedgerRow, Outcome
from robustfpd.evaluation.record import AttackResult, Check, EvaluationRecord, Proportion, Verdict
from robustfpd.evaluation.results import LoopState, attack_result, judged_at, left_out, survivors
from robustfpd.evaluation.suites import AttackSpec, SuiteContext
from robustfpd.evaluation.time_limit import TimeLimit, TimeLimitReached
from robustfpd.provenance import environment, weights_sha256
from robustfpd.rng import generator

SearchPrecision = Literal["fp32", "bf16"]
SMALLEST_SHARE = 8
"""Fewest images with the largest margins that an attack with a share takes."""
CPU_BLOCK_VALUES = 1 << 28
"""Pixel values that go forward per block of photographs on a CPU: a minute or two of a ResNet-18."""


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
        group: ProcessGroup, observer: EvaluationObserver, gallery: Gallery | None, limit: TimeLimit,
    ) -> None:  # fmt: skip
        self.settings, self.runner, self.surrogates, self.ledger = settings, runner, surrogates, ledger
        self.group, self.observer, self.gallery, self.limit = group, observer, gallery, limit
        self.state: LoopState | None = None
        """None until the attacks begin."""
        self.classified = 0
        """Images that were classified without an attack."""
        # Blocks and batches are the same on all ranks, though a rank may halve its runner's batch size later.
        self.batch_size = runner.batch_size
        given = None if settings.batch_size == "auto" else settings.batch_size
        fixed = suites.suite(settings.suite).batch_size  # then a block is one batch, as in the library
        self.block_size = block_size(len(runner.images), given) if fixed is None else given or fixed
        self.margins = torch.full((len(runner.images),), -torch.inf)
        """Largest margin that an attack reached on each image inside its ball, N; the nearest images are attacked
        first."""
        self.audits: dict[float, Tensor] = {}
        """Indices of the audited images by radius."""
        self.minimal_rows: dict[str, dict[int, LedgerRow]] = {}
        """Rows of attacks that search for the smallest perturbation, by attack and position of the image."""

    def run(self, input_checks: list[Check], forward: int) -> EvaluationRecord:
        """Evaluate, and return the record.

        Args:
            input_checks: outcomes of the checks that were made already.
            forward: images that these and other preparations sent forward.
        """
        settings, runner = self.settings, self.runner
        correct = self.classify()
        views, forward_for_views = self._set_views()
        radii = tuple(eps for eps in settings.radii if eps > 0)
        context = checks.CheckContext(runner, correct, radii, suites.suite(settings.suite).probes)
        context.resume = partial(self._resume, context)
        # What follows from the checks must be the same on all ranks, though their rounding may differ.
        made = self.group.broadcast(input_checks + checks.before_attacks(context))
        suite_context = SuiteContext(
            runner.norm, tuple(views), tuple(self.surrogates), checks.is_random(made), settings.seed
        )
        specs = suites.attack_specs(settings.suite, suite_context)
        self.state = LoopState(context, correct, specs, made, suite_context.best_view, forward + forward_for_views)
        # Which images attacks skip depends on these checks, and so does the suite.
        if not self.limit.reached():
            skip = not settings.every_attack and all(c.outcome in ("passed", "skipped") for c in made)
            with suppress(TimeLimitReached):
                self.attack_all(specs, correct, self.state.results, skip=skip)
        return self.conclude(self.state, min(self.group.gather(runner.batch_size)))

    def conclude(self, state: LoopState, batch_size: int) -> EvaluationRecord:
        """Check the results, and return the record; a partial one if the evaluation ended early."""
        settings, runner, rows = self.settings, self.runner, tuple(self.ledger.rows)
        results = (
            *state.results, *left_out(state, settings.radii, rows, every_attack=settings.every_attack)
        )  # fmt: skip
        robust = [survivors(rows, runner, state.correct, eps) for eps in settings.radii]
        findings = checks.AttackFindings(state.specs, rows, results, robust[-1], self.margins, self.classified)
        made = state.made + checks.after_attacks(state.context, findings)
        early = self.limit.reason if checks.is_incomplete(state.context, findings, made) else ""
        made.append(checks.complete(state.context, replace(findings, ended=early), made))
        if self.gallery is not None and early:
            self.gallery.save(final=False)
        elif self.gallery is not None:
            self.gallery.finish(runner.view_module(state.best_view), robust[-1])
        worst = (
            worst_case(
                eps, images, self.classified, None if early else self.audits.get(eps), state.specs, rows,
                runner.data.positions,
            )
            for eps, images in zip(settings.radii, robust, strict=True)
        )  # fmt: skip
        passes = [self._check_passes(state.context), *self.ledger.checks.passes.values()]
        return EvaluationRecord(
            model_name=settings.model_name, suite=settings.suite, norm=settings.norm, seed=settings.seed,
            batch_size=batch_size, batch_size_auto=settings.batch_size == "auto",
            search_precision=settings.search_precision, every_attack=settings.every_attack,
            clean=Proportion.of(int(state.correct.sum()), self.classified),
            worst_case=tuple(worst),
            attacks=results, ledger=rows, data_sha256=runner.data.digest(), verdict=Verdict.of(made),
            weights_sha256=weights_sha256(runner.classifier), environment=environment(runner.device),
            surrogates=tuple(self.surrogates), class_names=settings.class_names, settings_sha256=settings.sha256,
            complete=not early, check_forward_passes=state.forward + sum(forward for forward, _ in passes),
            check_backward_passes=sum(backward for _, backward in passes),
        )  # fmt: skip

    def attack_all(
        self, specs: Sequence[AttackSpec], correct: Tensor, results: list[AttackResult], *, skip: bool
    ) -> None:
        """Run all attacks at all radii on the correctly classified images, and append their results to `results`.

        With `skip`, attacks with a share skip images. Their audit is drawn again until one of them did.
        """
        settings, robust = self.settings, correct.clone()
        total = sum(eps > 0 for eps in settings.radii) * len(specs)
        for eps in settings.radii:
            for spec in specs if eps > 0 else ():
                number = len(results) + 1
                self.observer.on_attack(EvaluationProgress(spec.label, eps, number, total, int(robust.sum())))
                indices = torch.nonzero(correct if settings.every_attack else robust).flatten()
                skipping = skip and spec.share < 1
                if skipping and not any(r.skipped for r in results if r.eps == eps):
                    self.audits[eps] = draw_audit(indices, generator(settings.seed, "audit", repr(eps)))
                result, misclassified = self._attack(spec, eps, indices, self.audits[eps] if skipping else None)
                robust[misclassified] = False
                results.append(result)
                if self.gallery is not None:
                    self.gallery.save(final=eps == settings.radii[-1])

    def _resume(self, context: checks.CheckContext, name: str, compute: Callable[[], Any]) -> Any:
        """Return the saved result of a check, or compute it; None if the time limit is reached before its end."""
        saved = self.ledger.checks
        # All ranks have the same results, and ask the limit in the same order.
        if name not in saved.results and self.limit.reached():
            return None
        try:
            with self.limit.interrupting(context.classifier, context.white_box):
                return saved.resume(name, compute, partial(self._check_passes, context))
        except TimeLimitReached:
            return None

    def _check_passes(self, context: checks.CheckContext) -> tuple[int, int]:
        """Return the images that checks and views sent forward and backward in this process."""
        (forward, backward), counter = self.runner.check_passes, context.classifier  # the checks' own counter
        return forward + counter.forward_passes, backward + counter.backward_passes

    def classify(self) -> Tensor:
        """Classify the clean images; return which are classified correctly, N."""
        runner, done = self.runner, torch.zeros(len(self.runner.images), dtype=torch.bool)
        blocks = torch.split(torch.arange(len(runner.images)), self.block_size)
        with suppress(TimeLimitReached):
            for indices, outcome in self._outcomes(CLEAN, 0.0, blocks, runner.classify):
                runner.clean_predictions[indices] = torch.tensor([r.adversarial_prediction for r in outcome.rows])
                done[indices] = True
        self.classified = int(done.sum())
        return done & (runner.clean_predictions == runner.labels)

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
    ) -> tuple[AttackResult, Tensor]:  # fmt: skip
        """Run one attack at one radius.

        With an audit sample, it attacks its share of the images, those with the largest margins, and the sample. If it
        finds an adversarial example for an image of the sample that is not among the former, it goes on with all
        images; if it finds one for the half of the former with the smaller margins, with twice as many.

        Returns:
            Its result, and the indices of the images that it misclassified.
        """
        minimal_rows = self.minimal_rows.setdefault(spec.label, {})
        known = torch.tensor([int(i) in minimal_rows for i in indices], dtype=torch.bool)
        rows = self._judge_again(spec, eps, indices[known]) if bool(known.any()) else []
        order = self.margins[indices[~known]].argsort(descending=True, stable=True)
        remaining = indices[~known][order]
        sample = torch.empty(0, dtype=torch.long) if audit is None else audit[torch.isin(audit, remaining)]
        count = len(remaining)
        if audit is not None:
            count = max(math.ceil(spec.share * count), min(SMALLEST_SHARE, count))
        while len(remaining):
            nearest = remaining[:count]
            outside = sample[~torch.isin(sample, nearest)]
            chosen = torch.cat([nearest, outside])
            found = self._attack_blocks(spec, eps, chosen.sort().values)
            rows += found
            outcomes = {self.runner.data.positions[row.image]: row.outcome for row in found}
            everywhere = not found_nothing(outcomes[i] for i in outside.tolist())
            if not everywhere and found_nothing(outcomes[i] for i in nearest[count // 2 :].tolist()):
                break
            remaining = remaining[~torch.isin(remaining, chosen)]
            count, sample = len(remaining) if everywhere else 2 * count, sample[:0]
        positions = self.runner.data.positions
        misclassified = [positions[row.image] for row in rows if row.outcome == "misclassified"]
        result = attack_result(
            spec, eps, rows, total=len(self.runner.labels), every_attack=self.settings.every_attack,
            skipped=len(indices) - len(rows),
        )  # fmt: skip
        return result, torch.tensor(misclassified, dtype=torch.long)

    def _attack_blocks(self, spec: AttackSpec, eps: float, indices: Tensor) -> list[LedgerRow]:
        """Run one attack on images, a block or batch at a time."""
        runner, rows = self.runner, list[LedgerRow]()
        block_size = self._block_size(spec)
        size = block_size if fills_batches(spec) else self.batch_size
        blocks = torch.split(indices, block_size) if len(indices) else ()
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

    def _block_size(self, spec: AttackSpec) -> int:
        """Return the images to attack at a time, on which an attack is not interrupted.

        Photographs on a CPU: full batches gain nothing there, and a block would take hours.
        """
        if self.settings.batch_size != "auto" or self.runner.device.type != "cpu" or self.batch_size >= CPU_BATCH_SIZE:
            return self.block_size
        per_image = spec.iterations * self.runner.images[0].numel()
        return max(1, min(self.batch_size, CPU_BLOCK_VALUES // per_image))

    def _judge_again(self, spec: AttackSpec, eps: float, indices: Tensor) -> list[LedgerRow]:
        """Judge at this radius the smallest perturbations that an attack found at a smaller radius."""

        def judge(indices: Tensor) -> AttackOutcome:
            return AttackOutcome([judged_at(self.minimal_rows[spec.label][i], eps) for i in indices.tolist()])

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
            if label != CLEAN or start or replayed:  # a record needs an image
                self.limit.check()
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


def found_nothing(outcomes: Iterable[Outcome]) -> bool:
    """Return whether an attack worked on all images and found no adversarial example, so that others may be skipped."""
    return all(outcome == "robust" for outcome in outcomes)
