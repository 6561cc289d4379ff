"""Runs a suite against a classifier: worst case per image, attacking only what still stands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.attacks import adaptive
from robustfpd.attacks.adaptive import View
from robustfpd.attacks.attack import reproducible
from robustfpd.config import Norm
from robustfpd.errors import InputError
from robustfpd.evaluation import checks
from robustfpd.evaluation.bench import OUTSIDE, Bench, forward_passes
from robustfpd.evaluation.exhibits import Exhibits, exhibits_folder
from robustfpd.evaluation.inputs import (
    Data,
    check_count,
    check_module,
    checked_radii,
    device_of,
    digest,
    exact_digest,
    gather,
    look,
)  # fmt: skip
from robustfpd.evaluation.ledger import CLEAN, Ledger, LedgerRow, OtherEvaluation, is_unfinished
from robustfpd.evaluation.record import LEDGER, AttackResult, EvaluationRecord, Proportion, WorstCase
from robustfpd.evaluation.screening import fruitless, tranches
from robustfpd.evaluation.suite import Planned, Target, plan
from robustfpd.evaluation.suite import suite as suite_named
from robustfpd.evaluation.verdict import Check, Verdict
from robustfpd.models.mode import evaluating
from robustfpd.provenance import environment, weights_sha256
from robustfpd.seeding import generator


@dataclass(frozen=True)
class Stage:
    """Where an evaluation stands, for whoever displays it."""

    attack: str
    eps: float
    done: int
    total: int
    standing: int


@dataclass
class EvaluationObserver:
    """Callback for a display; does nothing unless set."""

    on_stage: Callable[[Stage], None] = field(default=lambda stage: None)


def evaluate(
    classifier: nn.Module,
    data: Data,
    *,
    suite: str = "quick",
    eps: float | Sequence[float] = 8 / 255,
    norm: Norm = "linf",
    num_images: int | None = None,
    seed: int = 0,
    out_dir: str | Path | None = None,
    surrogates: Mapping[str, nn.Module] | None = None,
    batch_size: int = 64,
    every_attack: bool = False,
    subject: str = "classifier",
    name: str = "record",
    class_names: Sequence[str] = (),
    exhibits: int = 30,
    observer: EvaluationObserver | None = None,
) -> EvaluationRecord:
    """Attack a classifier, count what withstands, and say whether that number can be trusted.

    An image that has fallen to one attack, or at a smaller radius, is not attacked again: the smaller
    perturbation lies in the larger ball. Attacks that know the defence join when the classifier is an FPD.

    Args:
        classifier: images N×C×H×W in [0, 1] → logits N×K, or one of our models. Attacked in evaluation mode; flags,
            parameters, gradients and buffers are afterwards what they were.
        data: (images, labels), or a loader of such batches.
        suite: name of a suite: `quick`, `standard`, `full`, `published`, …
        eps: radius or radii, in pixels of [0, 1].
        norm: `linf`, `l2` or `l1`.
        num_images: how many images, drawn by `seed`; None takes all.
        seed: seed of the choice of images and of the attacks.
        out_dir: folder for `record.json` and `record.ledger.csv`. The ledger is written as the evaluation goes: one
            that was killed goes on where it stood when it is repeated, and one that is done is read.
        surrogates: other classifiers on which transferred attacks are made, by name.
        batch_size: images per forward pass.
        every_attack: try every attack on every image that is classified rightly, for a curve per attack; costs
            more.
        subject: what the record calls the classifier.
        name: what the files in `out_dir` are called instead of `record`.
        class_names: what reports call the K classes; empty for numbers.
        exhibits: how many images that fell, and how many that did not, get pictures in `out_dir` for a report.
        observer: callback for a live display.

    Raises:
        InputError: unusable images, labels, radii, suite or classifier, or a folder that holds another evaluation.
    """
    classifier = adaptive.as_classifier(check_module(classifier))
    if torch.is_inference_mode_enabled():
        raise InputError("evaluations cannot run inside torch.inference_mode(): gradients are off for good; leave it")
    radii = checked_radii(eps, norm)
    for planned in plan(suite, Target(norm)):
        attacks.get(planned.attack).check_library(norm)
    check_count("batch_size", batch_size)
    check_count("seed", seed, least=0)
    check_count("exhibits", exhibits, least=0)
    images, labels, numbers = gather(data, num_images, seed)
    device = device_of(classifier, images)
    with forward_passes(classifier) as first_looks:
        behaviour, classes = look(classifier, images, device)
    if class_names and classes and len(class_names) != classes:
        raise InputError(f"class_names must be {classes}, one for each logit, found {len(class_names)}")
    others, passes = _surrogates(surrogates, images, device, classes)
    settings = {
        "suite": suite, "eps": [repr(e) for e in radii], "norm": norm, "seed": seed, "batch_size": batch_size,
        "every_attack": every_attack, "behaviour": behaviour, "images": exact_digest(images, labels),
        "weights": weights_sha256(classifier),
        "surrogates": {n: weights_sha256(m) for n, m in others.items()}, "packages": environment()["packages"],
    }  # fmt: skip
    path = None if out_dir is None else Path(out_dir) / f"{name}.json"
    sha = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    if path is not None and path.is_file() and not is_unfinished(path.with_suffix(LEDGER)):
        return _finished(path, sha, settings)
    ledger = Ledger(path and path.with_suffix(LEDGER), settings)
    with forward_passes(classifier) as looks:
        handed_over = checks.handed_over(classifier, images, device)
    bench = Bench(classifier, images, labels, numbers, device, norm, seed, batch_size, classes)
    shown = None if path is None else Exhibits(exhibits_folder(path), bench, sha, exhibits)
    watcher = observer or EvaluationObserver()
    run = _Run(bench, ledger, suite, radii, others, handed_over, every_attack, watcher, shown)
    with evaluating(classifier):
        record = run.record(subject, tuple(class_names), sha, passes + sum(first_looks) + sum(looks))
    if path is not None:
        record.save(path)
        ledger.finish()
    return record


def _surrogates(
    given: Mapping[str, nn.Module] | None, images: Tensor, device: torch.device, classes: int
) -> tuple[dict[str, nn.Module], int]:
    """The surrogates as classifiers, checked, and how many images were sent through them for that."""
    if not isinstance(given, (Mapping, type(None))):
        raise InputError(f"surrogates must be modules by name, found {type(given).__name__}")
    others = {n: adaptive.as_classifier(check_module(m, f"surrogate {n!r}")) for n, m in (given or {}).items()}
    passes = 0
    for name, other in others.items():
        with forward_passes(other) as looks:
            fits = device_of(other, images) == device and look(other, images, device)[1] == classes
        if not fits:
            raise InputError(f"surrogate {name!r} must lie on {device} and give {classes} logits like the classifier")
        passes += sum(looks)
    return others, passes


def _finished(path: Path, sha: str, settings: Mapping[str, Any]) -> EvaluationRecord:
    """The record that is there, if it is of this very evaluation."""
    record = EvaluationRecord.load(path)
    if record.settings_sha256 != sha:
        there = {
            "suite": record.suite, "norm": record.norm, "eps": [repr(w.eps) for w in record.worst_case],
            "seed": record.seed, "batch_size": record.batch_size, "every_attack": record.every_attack,
            "weights": record.weights_sha256, "packages": record.environment.get("packages"),
        }  # fmt: skip
        differing = (f"{k}={v!r}, this one has {settings[k]!r}" for k, v in there.items() if v != settings[k])
        raise OtherEvaluation(
            f"{path} holds another evaluation ({record.subject}, {record.num_images} images) with "
            f"{next(differing, 'other images or surrogates')}; give another out_dir or name"
        )
    return record


class _Run:
    """State of one evaluation."""

    def __init__(
        self, bench: Bench, ledger: Ledger, suite: str, radii: Sequence[float], surrogates: Mapping[str, nn.Module],
        handed_over: list[Check], every_attack: bool, observer: EvaluationObserver, exhibits: Exhibits | None,
    ) -> None:  # fmt: skip
        self.exhibits = exhibits
        self.bench, self.ledger, self.suite, self.radii = bench, ledger, suite, radii
        self.surrogates, self.every_attack, self.observer = surrogates, every_attack, observer
        self.checks = handed_over
        self.closest = torch.full((len(bench.images),), -torch.inf)
        """How near each image has come to falling."""
        self.stages = 0  # attacks that are done
        self.smallest: dict[str, dict[int, LedgerRow]] = {}
        """What attacks that look for the smallest perturbation found, by attack and image."""

    def record(self, subject: str, class_names: tuple[str, ...], settings_sha256: str, looked: int) -> EvaluationRecord:
        """Do everything; `looked` is how many images went forward before."""
        worst, results, verdict = self.everything()
        bench = self.bench
        forward, backward = self.passes_of_checks()
        return EvaluationRecord(
            subject=subject, suite=self.suite, norm=bench.norm, seed=bench.seed, batch_size=bench.batch_size,
            every_attack=self.every_attack, clean=worst[0].robust, worst_case=worst[1:], attacks=results,
            ledger=tuple(self.ledger.rows), data_sha256=digest(bench.images, bench.labels), verdict=verdict,
            weights_sha256=weights_sha256(bench.classifier), environment=environment(bench.device),
            surrogates=tuple(self.surrogates), class_names=class_names, settings_sha256=settings_sha256,
            check_forward_passes=looked + forward, check_backward_passes=backward,
        )  # fmt: skip

    def everything(self) -> tuple[tuple[WorstCase, ...], tuple[AttackResult, ...], Verdict]:
        """Clean images, checks, attacks, checks of these; the first worst case is that of the clean images."""
        bench, suite = self.bench, suite_named(self.suite)
        count = len(bench.images)
        self._clean()
        correct = bench.clean == bench.labels
        with forward_passes(bench.classifier) as self.looks, reproducible(generator(bench.seed, "views")):
            views = adaptive.adaptive_views(bench.classifier, bench.images[:4].to(bench.device))
        taken = sorted({*views} & {*self.surrogates})
        if taken:
            raise InputError(f"a surrogate cannot be called {taken[0]!r}: a view of the classifier has that name")
        bench.offer(views | {n: View(m, surrogate=True) for n, m in self.surrogates.items()})
        self.subject = checks.Subject(bench, correct, self.radii, suite.probes)
        self.checks += checks.before_attacks(self.subject)
        doubtful = any(c.outcome in ("suspicious", "failed") for c in self.checks)
        target = Target(bench.norm, tuple(views), tuple(self.surrogates), checks.is_random(self.checks))
        planned = plan(self.suite, target)
        standing = correct.clone()
        results: list[AttackResult] = []
        worst = [WorstCase(eps=0, robust=Proportion.of(int(correct.sum()), count))]
        for eps in self.radii:
            for attack in planned:
                self.stages = len(results)
                stage = Stage(attack.label, eps, self.stages + 1, len(self.radii) * len(planned), int(standing.sum()))
                self.observer.on_stage(stage)
                tried = torch.nonzero(correct if self.every_attack else standing).flatten()
                result, fallen = self._attack(attack, eps, tried, spare=not doubtful)
                standing[fallen] = False
                results.append(result)
                if self.exhibits is not None:
                    self.exhibits.save(final=eps == self.radii[-1])
            worst.append(WorstCase(eps=eps, robust=Proportion.of(int(standing.sum()), count)))
        findings = checks.Findings(planned, tuple(self.ledger.rows), results, standing, self.closest)
        self.checks += checks.after_attacks(self.subject, findings)
        if self.exhibits is not None:
            self.exhibits.finish(bench.uncounted(target.best), standing)
        return tuple(worst), tuple(results), Verdict.of(self.checks)

    def passes_of_checks(self) -> tuple[int, int]:
        """Images forward and backward, but for those of attacks and of the clean predictions."""
        forward, backward = self.bench.looks
        own = self.subject.classifier  # it goes round the views
        return sum(self.looks) + forward + own.forward_passes, backward + own.backward_passes

    def _clean(self) -> None:
        """Classify the images as they are."""
        bench = self.bench
        for indices in torch.split(torch.arange(len(bench.images)), bench.batch_size):
            rows = self.ledger.replay(CLEAN, 0.0, bench.numbers[indices].tolist())
            if rows is None:
                rows = bench.ask(indices)
                self.ledger.add(rows)
            bench.clean[indices] = torch.tensor([r.adversarial_prediction for r in rows])

    def _attack(self, planned: Planned, eps: float, tried: Tensor, *, spare: bool) -> tuple[AttackResult, Tensor]:
        """Run one attack on the images `tried`; return its result and the indices that fell."""
        rows, spared, found = [], 0, self.smallest.setdefault(planned.label, {})
        known = torch.tensor([int(i) in found for i in tried], dtype=torch.bool)
        rows += self._again(planned, eps, tried[known]) if bool(known.any()) else []
        fresh = tried[~known]
        screened = planned.screened and spare and not self.every_attack
        draws = generator(self.bench.seed, "tranches", planned.label, repr(eps))
        parts = tranches(fresh, self.closest[fresh], draws) if screened else [fresh]
        for tranche in parts:
            tranche_rows = [
                r for batch in torch.split(tranche, self.bench.batch_size) for r in self._batch(planned, eps, batch)
            ]
            rows += tranche_rows
            if screened and fruitless(tranche_rows):
                spared = len(tried) - len(rows)
                break
        place = {int(number): i for i, number in enumerate(self.bench.numbers)}
        lost = torch.tensor([place[r.image] for r in rows if r.outcome == "fooled"], dtype=torch.long)
        return self._result(planned, eps, rows, spared), lost

    def _batch(self, planned: Planned, eps: float, indices: Tensor) -> list[LedgerRow]:
        """One batch: as the ledger has it, or attacked now."""
        if len(indices) == 0:
            return []
        rows = self.ledger.replay(planned.label, eps, self.bench.numbers[indices].tolist())
        self.bench.found = None
        if rows is None:
            rows = self.bench.run(planned, eps, indices)
            self.ledger.add(rows)
        self._see(planned, eps, indices, rows)
        # What lies outside the ball tells nothing of how near an image came to falling inside.
        limit = eps * (1 + OUTSIDE) + OUTSIDE
        told = [r.outcome != "failed" and r.distance <= limit for r in rows]
        near = torch.tensor([r.closeness if t else -torch.inf for r, t in zip(rows, told, strict=True)])
        self.closest[indices] = torch.maximum(self.closest[indices], near)
        if attacks.get(planned.attack).minimal:
            self.smallest[planned.label].update(
                {i: r for i, r in zip(indices.tolist(), rows, strict=True) if r.outcome != "failed"}
            )
        return rows

    def _again(self, planned: Planned, eps: float, indices: Tensor) -> list[LedgerRow]:
        """What was found at a smaller radius by an attack that does not depend on it, judged at this one."""
        rows = self.ledger.replay(planned.label, eps, self.bench.numbers[indices].tolist())
        if rows is None:
            rows = []
            for i in indices.tolist():
                row = self.smallest[planned.label][i]
                fooled = row.adversarial_prediction != row.label and row.distance <= eps * (1 + OUTSIDE)
                changes: dict[str, Any] = {"eps": eps, "outcome": "fooled" if fooled else "withstood"}
                rows.append(row.model_copy(update={**changes, "queries": 0, "gradients": 0, "seconds": 0.0}))
            self.ledger.add(rows)
        self.bench.found = None
        self._see(planned, eps, indices, rows)
        return rows

    def _see(self, planned: Planned, eps: float, indices: Tensor, rows: list[LedgerRow]) -> None:
        """Let images be chosen for the report."""
        if self.exhibits is not None:
            self.exhibits.see(self.stages, planned, eps, indices, rows)

    def _result(self, planned: Planned, eps: float, rows: Sequence[LedgerRow], spared: int) -> AttackResult:
        attack, total = attacks.get(planned.attack), len(self.bench.labels)
        fooled = [r for r in rows if r.outcome == "fooled"]
        blind = attack.access != "gradients" and bool(fooled)
        found = [r.distance for r in rows if r.distance > 0 and r.outcome != "failed"] if attack.minimal else []
        return AttackResult(
            attack=planned.label, eps=eps, attacked=len(rows), fooled=len(fooled),
            accuracy=Proportion.of(len(rows) - len(fooled), total) if self.every_attack else None,
            seconds=sum(r.seconds for r in rows), failed=sum(r.outcome == "failed" for r in rows), spared=spared,
            forward_passes=sum(r.queries for r in rows), backward_passes=sum(r.gradients for r in rows),
            median_queries=_median([r.queries for r in fooled]) if blind else None,
            median_distance=_median(found) if found else None,
        )  # fmt: skip


def _median(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(0.5))
