"""The stages of an evaluation: clean images, checks, attacks on what still stands, checks of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.attacks import adaptive
from robustfpd.attacks.adaptive import View
from robustfpd.attacks.base import reproducible
from robustfpd.distributed import ProcessGroup, shared_errors
from robustfpd.errors import InputError
from robustfpd.evaluation import checks
from robustfpd.evaluation.attack_runner import OUTSIDE, AttackRunner, forward_passes
from robustfpd.evaluation.early_stopping import fruitless, tranches
from robustfpd.evaluation.gallery import Gallery
from robustfpd.evaluation.inputs import digest
from robustfpd.evaluation.ledger import CLEAN, Ledger, LedgerRow
from robustfpd.evaluation.record import AttackResult, EvaluationRecord, Proportion, WorstCase
from robustfpd.evaluation.suites import AttackSpec, SuiteContext, plan
from robustfpd.evaluation.suites import suite as suite_named
from robustfpd.evaluation.verdict import Check, Verdict
from robustfpd.provenance import environment, weights_sha256
from robustfpd.rng import generator


@dataclass(frozen=True)
class EvaluationProgress:
    """The attack that an evaluation runs next."""

    attack: str
    eps: float
    number: int
    """Of the attack, from 1."""
    total: int
    survivors: int
    """Images for which no adversarial example was found yet."""


@dataclass
class EvaluationObserver:
    """Callbacks of a display; they do nothing unless set."""

    on_attack: Callable[[EvaluationProgress], None] = field(default=lambda progress: None)


@dataclass(frozen=True)
class Sizes:
    """How images are parted; the same on every process, whatever each finds that its memory holds."""

    block: int
    """Images attacked as one."""
    batch: int
    """Images that go through the classifier at once, to begin with."""
    found: bool
    """Nobody said how many: they were found."""


class Stages:
    """State of one evaluation."""

    def __init__(
        self, runner: AttackRunner, ledger: Ledger, suite: str, radii: Sequence[float],
        surrogates: Mapping[str, nn.Module],
        input_checks: list[Check], every_attack: bool, observer: EvaluationObserver, gallery: Gallery | None,
        sizes: Sizes, group: ProcessGroup,
    ) -> None:  # fmt: skip
        self.gallery, self.sizes, self.group = gallery, sizes, group
        self.runner, self.ledger, self.suite, self.radii = runner, ledger, suite, radii
        self.surrogates, self.every_attack, self.observer = surrogates, every_attack, observer
        self.checks = input_checks
        self.closest = torch.full((len(runner.images),), -torch.inf)
        """How near each image has come to falling."""
        self.stages = 0  # attacks that are done
        self.smallest: dict[str, dict[int, LedgerRow]] = {}
        """What attacks that look for the smallest perturbation found, by attack and image."""

    def record(
        self, model_name: str, class_names: tuple[str, ...], settings_sha256: str, looked: int
    ) -> EvaluationRecord:
        """Do everything; `looked` is how many images went forward before."""
        worst, results, verdict = self.everything()
        runner = self.runner
        forward, backward = self.passes_of_checks()
        batch_size = min(self.group.gather(runner.batch_size))
        return EvaluationRecord(
            model_name=model_name, suite=self.suite, norm=runner.norm, seed=runner.seed, batch_size=batch_size,
            batch_size_auto=self.sizes.found, search_precision="bf16" if runner.bfloat16 else "fp32",
            every_attack=self.every_attack, clean=worst[0].robust, worst_case=worst[1:], attacks=results,
            ledger=tuple(self.ledger.rows), data_sha256=digest(runner.images, runner.labels), verdict=verdict,
            weights_sha256=weights_sha256(runner.classifier), environment=environment(runner.device),
            surrogates=tuple(self.surrogates), class_names=class_names, settings_sha256=settings_sha256,
            check_forward_passes=looked + forward, check_backward_passes=backward,
        )  # fmt: skip

    def everything(self) -> tuple[tuple[WorstCase, ...], tuple[AttackResult, ...], Verdict]:
        """Clean images, checks, attacks, checks of these; the first worst case is that of the clean images."""
        runner, suite = self.runner, suite_named(self.suite)
        count = len(runner.images)
        self._clean()
        correct = runner.clean == runner.labels
        with forward_passes(runner.classifier) as self.looks, reproducible(generator(runner.seed, "views")):
            views = adaptive.adaptive_views(runner.classifier, runner.images[:4].to(runner.device))
        taken = sorted({*views} & {*self.surrogates})
        with shared_errors():
            if taken:
                raise InputError(f"a surrogate cannot be called {taken[0]!r}: a view of the classifier has that name")
        runner.offer(views | {n: View(m, surrogate=True) for n, m in self.surrogates.items()})
        self.subject = checks.CheckContext(runner, correct, self.radii, suite.probes)
        # What follows from the checks must be the same everywhere, even where processors round differently.
        self.checks = self.group.broadcast(self.checks + checks.before_attacks(self.subject))
        doubtful = any(c.outcome in ("suspicious", "failed") for c in self.checks)
        target = SuiteContext(runner.norm, tuple(views), tuple(self.surrogates), checks.is_random(self.checks))
        planned = plan(self.suite, target)
        standing = correct.clone()
        results: list[AttackResult] = []
        worst = [WorstCase(eps=0, robust=Proportion.of(int(correct.sum()), count))]
        for eps in self.radii:
            for attack in planned:
                self.stages = len(results)
                stage = EvaluationProgress(
                    attack.label, eps, self.stages + 1, len(self.radii) * len(planned), int(standing.sum())
                )
                self.observer.on_attack(stage)
                tried = torch.nonzero(correct if self.every_attack else standing).flatten()
                result, fallen = self._attack(attack, eps, tried, spare=not doubtful)
                standing[fallen] = False
                results.append(result)
                if self.gallery is not None:
                    self.gallery.save(final=eps == self.radii[-1])
            worst.append(WorstCase(eps=eps, robust=Proportion.of(int(standing.sum()), count)))
        findings = checks.AttackFindings(planned, tuple(self.ledger.rows), results, standing, self.closest)
        self.checks += checks.after_attacks(self.subject, findings)
        if self.gallery is not None:
            self.gallery.finish(runner.uncounted(target.best), standing)
        return tuple(worst), tuple(results), Verdict.of(self.checks)

    def passes_of_checks(self) -> tuple[int, int]:
        """Images forward and backward, but for those of attacks and of the clean predictions."""
        forward, backward = self.runner.looks
        own = self.subject.classifier  # it goes round the views
        return sum(self.looks) + forward + own.forward_passes, backward + own.backward_passes

    def _clean(self) -> None:
        """Classify the images as they are."""
        runner = self.runner
        units = list(torch.split(torch.arange(len(runner.images)), self.sizes.block))
        for indices, rows in self._worked(CLEAN, 0.0, units, runner.ask):
            runner.clean[indices] = torch.tensor([r.adversarial_prediction for r in rows])

    def _worked(
        self, label: str, eps: float, units: Sequence[Tensor], work: Callable[[Tensor], list[LedgerRow]]
    ) -> Iterator[tuple[Tensor, list[LedgerRow]]]:
        """Rows of each unit of images, in order: from the ledger, or from `work`, which the ranks do in turn."""
        group, runner = self.group, self.runner
        known = group.run_on_main(lambda: self._known(label, eps, units))
        for indices, rows in zip(units, known, strict=False):
            runner.found = None
            if not group.is_main:
                self.ledger.add(rows)
            yield indices, rows
        left = units[len(known) :]
        for at in range(0, len(left), group.world_size):
            turn = left[at : at + group.world_size]
            with shared_errors():
                own_rows = work(turn[group.rank]) if group.rank < len(turn) else []
            found = runner.found
            for rank, (indices, rows) in enumerate(zip(turn, group.gather(own_rows), strict=False)):
                self._write(rows)
                runner.found = found if rank == group.rank else None
                yield indices, rows

    def _known(self, label: str, eps: float, units: Sequence[Tensor]) -> list[list[LedgerRow]]:
        """Rows of the first units, as far as the ledger has them."""
        known = []
        for indices in units:
            rows = self.ledger.replay(label, eps, self.runner.numbers[indices].tolist())
            if rows is None:
                break
            known.append(rows)
        return known

    def _write(self, rows: Sequence[LedgerRow]) -> None:
        """Add rows to the ledger of every rank; rank 0 has the file."""
        with shared_errors():
            self.ledger.add(rows)

    def _attack(self, planned: AttackSpec, eps: float, tried: Tensor, *, spare: bool) -> tuple[AttackResult, Tensor]:
        """Run one attack on the images `tried`; return its result and the indices that fell."""
        rows, skipped, found = [], 0, self.smallest.setdefault(planned.label, {})
        known = torch.tensor([int(i) in found for i in tried], dtype=torch.bool)
        rows += self._again(planned, eps, tried[known]) if bool(known.any()) else []
        fresh = tried[~known]
        screened = planned.screened and spare and not self.every_attack
        draws = generator(self.runner.seed, "tranches", planned.label, repr(eps))
        parts = tranches(fresh, self.closest[fresh], draws) if screened else [fresh]
        for tranche in parts:
            tranche_rows = self._tranche(planned, eps, tranche)
            rows += tranche_rows
            if screened and fruitless(tranche_rows):
                skipped = len(tried) - len(rows)
                break
        place = {int(number): i for i, number in enumerate(self.runner.numbers)}
        lost = torch.tensor([place[r.image] for r in rows if r.outcome == "misclassified"], dtype=torch.long)
        return self._result(planned, eps, rows, skipped), lost

    def _tranche(self, planned: AttackSpec, eps: float, indices: Tensor) -> list[LedgerRow]:
        """Run one attack on images, block by block."""
        runner, sizes, all_rows = self.runner, self.sizes, list[LedgerRow]()
        blocks = torch.split(indices, sizes.block) if len(indices) else ()
        units = [unit for block in blocks for unit in runner.units(planned, block, sizes.batch)]
        for unit, rows in self._worked(planned.label, eps, units, lambda unit: runner.run(planned, eps, unit)):
            self._learn(planned, eps, unit, rows)
            all_rows += rows
        return all_rows

    def _learn(self, planned: AttackSpec, eps: float, indices: Tensor, rows: list[LedgerRow]) -> None:
        """Note how near images came to falling, and what need not be looked for again."""
        self._see(planned, eps, indices, rows)
        # What lies outside the ball tells nothing of how near an image came to falling inside.
        limit = eps * (1 + OUTSIDE) + OUTSIDE
        told = [r.outcome != "failed" and r.distance <= limit for r in rows]
        near = torch.tensor([r.margin if t else -torch.inf for r, t in zip(rows, told, strict=True)])
        self.closest[indices] = torch.maximum(self.closest[indices], near)
        if attacks.get(planned.attack).minimal:
            self.smallest[planned.label].update(
                {i: r for i, r in zip(indices.tolist(), rows, strict=True) if r.outcome != "failed"}
            )

    def _again(self, planned: AttackSpec, eps: float, indices: Tensor) -> list[LedgerRow]:
        """What was found at a smaller radius by an attack that does not depend on it, judged at this one."""

        def judged(indices: Tensor) -> list[LedgerRow]:
            rows = []
            for i in indices.tolist():
                row = self.smallest[planned.label][i]
                misclassified = row.adversarial_prediction != row.label and row.distance <= eps * (1 + OUTSIDE)
                changes: dict[str, Any] = {"eps": eps, "outcome": "misclassified" if misclassified else "robust"}
                rows.append(row.model_copy(update={**changes, "queries": 0, "gradients": 0, "seconds": 0.0}))
            return rows

        ((_, rows),) = self._worked(planned.label, eps, [indices], judged)
        self.runner.found = None
        self._see(planned, eps, indices, rows)
        return rows

    def _see(self, planned: AttackSpec, eps: float, indices: Tensor, rows: list[LedgerRow]) -> None:
        """Let images be chosen for the report."""
        if self.gallery is not None:
            self.gallery.see(self.stages, planned, eps, indices, rows)

    def _result(self, planned: AttackSpec, eps: float, rows: Sequence[LedgerRow], skipped: int) -> AttackResult:
        attack, total = attacks.get(planned.attack), len(self.runner.labels)
        misclassified = [r for r in rows if r.outcome == "misclassified"]
        blind = attack.access != "gradients" and bool(misclassified)
        found = [r.distance for r in rows if r.distance > 0 and r.outcome != "failed"] if attack.minimal else []
        return AttackResult(
            attack=planned.label, eps=eps, attacked=len(rows), misclassified=len(misclassified),
            accuracy=Proportion.of(len(rows) - len(misclassified), total) if self.every_attack else None,
            seconds=sum(r.seconds for r in rows), failed=sum(r.outcome == "failed" for r in rows), skipped=skipped,
            forward_passes=sum(r.queries for r in rows), backward_passes=sum(r.gradients for r in rows),
            median_queries=_median([r.queries for r in misclassified]) if blind else None,
            median_distance=_median(found) if found else None,
        )  # fmt: skip


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
