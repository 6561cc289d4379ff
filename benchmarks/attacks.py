"""Our gradient attacks and other libraries' on one trained network, at an equal number of passes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.libraries import LIBRARIES, OURS, ROBUSTFPD, AttackCase, Prepare, Run, bare_passes
from benchmarks.results import Bar, ImplementationResult, Measure, Workload
from benchmarks.sizes import BenchmarkSizes
from benchmarks.timing import Implementation, RoundLimits, Timing, interleave, synchronizer
from robustfpd import data, load
from robustfpd.attacks.base import QueryCounter, preserve_state, reproducible
from robustfpd.config import DataConfig, Norm
from robustfpd.errors import MissingDataError
from robustfpd.rng import generator

EPS: dict[str, dict[str, float]] = {"mnist": {"linf": 0.1, "l2": 1.5}, "digits": {"linf": 0.1, "l2": 0.5}}
"""Radii at which some images are misclassified and others are not."""
STEP_SIZE = 0.25
"""Of PGD, as a fraction of eps."""
KINDS: tuple[tuple[str, Norm], ...] = (("pgd", "linf"), ("pgd", "l2"), ("apgd-ce", "linf"))
NAMES = {"linf": "L∞", "l2": "L2"}
BARE = "bare passes"
BARE_BAR, LIBRARY_BAR = 1.05, 1.0


@dataclass(frozen=True)
class AttackedNetwork:
    """A trained classifier in evaluation mode, and test images."""

    name: str
    dataset: str
    classifier: nn.Module
    images: Tensor
    labels: Tensor

    def case(self, count: int, steps: int, norm: Norm) -> AttackCase:
        """Return an attack on `count` images; where there are fewer, they are repeated."""
        indices = torch.arange(count, device=self.images.device) % len(self.images)
        eps = EPS[self.dataset][norm]
        with torch.no_grad():
            classes = self.classifier(self.images[:1]).shape[1]
        return AttackCase(
            self.classifier, self.images[indices], self.labels[indices], eps, norm, steps, STEP_SIZE * eps, classes
        )


def attacked_network(sizes: BenchmarkSizes, data_root: str, device: torch.device, count: int) -> AttackedNetwork:
    """Load the first network of `sizes.trained` whose data set is available, with `count` of its test images."""
    for name in sizes.trained:
        dataset = name.partition("/")[0]
        try:
            test = data.load(DataConfig(dataset=dataset, root=data_root)).test
        except MissingDataError:
            continue
        drawn = torch.randperm(len(test), generator=generator(0, "images"))[:count]
        images, labels = test.floats(drawn)
        classifier = load(name).classifier().to(device).eval().requires_grad_(False)
        return AttackedNetwork(name, dataset, classifier, images.to(device), labels.to(device))
    raise AssertionError("digits come with scikit-learn")


def attack_workloads(sizes: BenchmarkSizes, limits: RoundLimits, network: AttackedNetwork) -> Iterator[Workload]:
    """Yield a workload for each attack, norm and batch size."""
    for attack, norm in KINDS:
        steps = sizes.steps if attack == "pgd" else sizes.apgd_steps
        for count in sizes.batches:
            case = network.case(count, steps, norm)
            title = f"{'PGD' if attack == 'pgd' else 'APGD-CE'}, {steps} steps, {NAMES[norm]}, eps {case.eps:g}"
            with preserve_state(case.classifier), reproducible(generator(0, "benchmark")):
                yield compare(attack, case, limits, f"{title}: {network.name}")


def compare(attack: str, case: AttackCase, limits: RoundLimits, group: str) -> Workload:
    """Time all libraries that have the attack, and as many bare passes as ours makes."""
    missing = {name: reason for name, library in LIBRARIES.items() if (reason := library.missing(attack))}
    prepare = {OURS: ROBUSTFPD[attack], **{n: lib.attacks[attack] for n, lib in LIBRARIES.items() if n not in missing}}
    passes = {name: _passes(make, case) for name, make in prepare.items()}
    forward, backward = passes[OURS] if attack == "pgd" else (case.steps + 1, case.steps + 1)
    runs = {BARE: bare_passes(case, round(forward), round(backward)), **{n: make(case) for n, make in prepare.items()}}
    implementations = [Implementation(name, _seeded(run)) for name, run in runs.items()]
    # The runs that count passes were the warm-up.
    timing = interleave(implementations, limits, synchronize=synchronizer(case.images.device), warm_ups=0)
    passes[BARE] = forward, backward
    entries = [_result(name, case, timing, passes[name]) for name in runs]
    entries += [ImplementationResult(name=name, missing=reason) for name, reason in missing.items()]
    notes = ("our APGD stops at misclassified images; compare the passes",) if attack == "apgd-ce" else ()
    return Workload(
        group=group, variant=f"batch {len(case.images)}", reference=BARE, entries=tuple(entries),
        measures=tuple(_measures(attack, timing)), notes=notes,
    )  # fmt: skip


def _measures(attack: str, timing: Timing) -> Iterator[Measure]:
    """Ours over the bare passes, where both make the same ones, and over the fastest library."""
    if attack == "pgd":
        yield Measure(what=f"ours / {BARE}", value=timing.ratio(OURS, BARE), bar=Bar(at_most=BARE_BAR))
    others = [name for name in timing.seconds if name not in (OURS, BARE)]
    if others:
        fastest = min(others, key=lambda name: timing.quartiles(name).median)
        yield Measure(what=f"ours / {fastest}", value=timing.ratio(OURS, fastest), bar=Bar(at_most=LIBRARY_BAR))


def _result(name: str, case: AttackCase, timing: Timing, passes: tuple[float, float]) -> ImplementationResult:
    robust = None if name == BARE else accuracy(case.classifier, timing.returned[name], case.labels)
    return ImplementationResult(
        name=name, seconds=timing.quartiles(name), ratio=timing.ratio(name, BARE), accuracy=robust,
        forward=passes[0], backward=passes[1],
    )  # fmt: skip


def _passes(prepare: Prepare, case: AttackCase) -> tuple[float, float]:
    """Count forward and backward passes per image in a run that is not timed."""
    counter = QueryCounter(case.classifier)
    counter.eval()
    run = prepare(replace(case, classifier=counter))
    counter.reset()  # without the prediction that ART makes at its setup
    _seeded(run)()
    return counter.forward_passes / len(case.images), counter.backward_passes / len(case.images)


def _seeded(run: Run) -> Run:
    """Seed the global random states that libraries draw from, and silence their printing."""

    def seeded() -> Tensor:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - ART draws from it
        with redirect_stdout(io.StringIO()):
            return run()

    return seeded


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the fraction of images classified correctly."""
    return cast(float, (classifier(images).argmax(dim=1) == labels).float().mean().item())
