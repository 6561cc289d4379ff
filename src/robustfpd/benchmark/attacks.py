"""Our gradient attacks beside other libraries', at equal work, on one trained network."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from robustfpd import data, load
from robustfpd.attacks.base import preserve_state, reproducible
from robustfpd.attacks.query_counter import QueryCounter
from robustfpd.benchmark.machine import synchroniser
from robustfpd.benchmark.peers import OURS, OWN, PEERS, Run, Work, floor
from robustfpd.benchmark.result import Bar, Entry, Measure, Workload
from robustfpd.benchmark.scale import Scale
from robustfpd.benchmark.timing import Contender, Pace, Timing, interleave
from robustfpd.config import DataConfig, Norm
from robustfpd.errors import MissingDataError
from robustfpd.rng import generator

EPS: dict[str, dict[str, float]] = {"mnist": {"linf": 0.1, "l2": 1.5}, "digits": {"linf": 0.1, "l2": 0.5}}
"""Radii at which some images fall and others do not."""
STEP = 0.25
"""PGD's step, in eps."""
KINDS: tuple[tuple[str, Norm], ...] = (("pgd", "linf"), ("pgd", "l2"), ("apgd-ce", "linf"))
NAMES = {"linf": "L∞", "l2": "L2"}
FLOOR = "bare passes"
FLOOR_BAR, PEER_BAR = 1.05, 1.0


@dataclass(frozen=True)
class Victim:
    """A trained network, in evaluation mode, and images to attack."""

    name: str
    dataset: str
    classifier: nn.Module
    images: Tensor
    labels: Tensor

    def work(self, count: int, steps: int, norm: Norm) -> Work:
        """Attack the first `count` images, from the front again where there are fewer."""
        rows = torch.arange(count, device=self.images.device) % len(self.images)
        eps = EPS[self.dataset][norm]
        with torch.no_grad():
            classes = self.classifier(self.images[:1]).shape[1]
        return Work(self.classifier, self.images[rows], self.labels[rows], eps, norm, steps, STEP * eps, classes)


def victim(scale: Scale, data_root: str, device: torch.device, count: int) -> Victim:
    """The first of the scale's networks whose images are there, with `count` test images drawn by a seed."""
    for name in scale.trained:
        dataset = name.partition("/")[0]
        try:
            test = data.load(DataConfig(dataset=dataset, root=data_root)).test
        except MissingDataError:
            continue
        drawn = torch.randperm(len(test), generator=generator(0, "images"))[:count]
        images, labels = test.floats(drawn)
        classifier = load(name).classifier().to(device).eval().requires_grad_(False)
        return Victim(name, dataset, classifier, images.to(device), labels.to(device))
    raise AssertionError("digits come with scikit-learn")


def attack_workloads(scale: Scale, pace: Pace, target: Victim) -> Iterator[Workload]:
    """Every attack, norm and batch size."""
    for attack, norm in KINDS:
        steps = scale.steps if attack == "pgd" else scale.apgd_steps
        for count in scale.batches:
            work = target.work(count, steps, norm)
            title = f"{'PGD' if attack == 'pgd' else 'APGD-CE'}, {steps} steps, {NAMES[norm]}, eps {work.eps:g}"
            with preserve_state(work.classifier), reproducible(generator(0, "benchmark")):
                yield compared(attack, work, pace, f"{title}: {target.name}")


def compared(attack: str, work: Work, pace: Pace, group: str) -> Workload:
    """Time everybody who has the attack, beside as many bare passes as ours makes."""
    out = {name: reason for name, peer in PEERS.items() if (reason := peer.missing(attack))}
    makers = {OURS: OWN[attack], **{name: p.attacks[attack] for name, p in PEERS.items() if name not in out}}
    passes = {name: _passes(make, work) for name, make in makers.items()}
    forward, backward = passes[OURS] if attack == "pgd" else (work.steps + 1, work.steps + 1)
    runs = {FLOOR: floor(work, round(forward), round(backward)), **{n: make(work) for n, make in makers.items()}}
    contenders = [Contender(name, _seeded(run)) for name, run in runs.items()]
    # Counting passes has warmed everybody up.
    timing = interleave(contenders, pace, synchronise=synchroniser(work.images.device), warm_ups=0)
    passes[FLOOR] = forward, backward
    entries = [_entry(name, work, timing, passes[name]) for name in runs]
    entries += [Entry(name=name, missing=reason) for name, reason in out.items()]
    notes = ("our APGD lets go of images that have fallen; see the passes",) if attack == "apgd-ce" else ()
    return Workload(
        group=group, variant=f"batch {len(work.images)}", reference=FLOOR, entries=tuple(entries),
        measures=tuple(_measures(attack, timing)), notes=notes,
    )  # fmt: skip


def _measures(attack: str, timing: Timing) -> Iterator[Measure]:
    """Ours against the floor, where it does all of the work, and against the fastest library."""
    if attack == "pgd":
        yield Measure(what="ours / bare passes", value=timing.ratio(OURS, FLOOR), bar=Bar(at_most=FLOOR_BAR))
    others = [name for name in timing.seconds if name not in (OURS, FLOOR)]
    if others:
        fastest = min(others, key=lambda name: timing.spread(name).median)
        yield Measure(what=f"ours / {fastest}", value=timing.ratio(OURS, fastest), bar=Bar(at_most=PEER_BAR))


def _entry(name: str, work: Work, timing: Timing, passes: tuple[float, float]) -> Entry:
    standing = None if name == FLOOR else accuracy(work.classifier, timing.returned[name], work.labels)
    return Entry(
        name=name, seconds=timing.spread(name), ratio=timing.ratio(name, FLOOR), accuracy=standing,
        forward=passes[0], backward=passes[1],
    )  # fmt: skip


def _passes(make: Callable[[Work], Run], work: Work) -> tuple[float, float]:
    """Forward and backward passes per image, counted in a run that is not timed."""
    counted = QueryCounter(work.classifier)
    counted.eval()
    run = make(replace(work, classifier=counted))
    counted.reset()  # ART asks for a first prediction when it is set up
    _seeded(run)()
    return counted.forward_passes / len(work.images), counted.backward_passes / len(work.images)


def _seeded(run: Run) -> Run:
    """Libraries draw from the global random states, and print."""

    def seeded() -> Tensor:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - ART's source
        with redirect_stdout(io.StringIO()):
            return run()

    return seeded


@torch.no_grad()
def accuracy(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that are classified correctly."""
    return cast(float, (classifier(images).argmax(dim=1) == labels).float().mean().item())
