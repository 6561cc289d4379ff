"""Our suite beside the same attacks, one after another with their libraries, each on every image."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.attacks.base import preserve_state, reproducible
from robustfpd.attacks.query_counter import QueryCounter
from robustfpd.benchmark.attacks import NAMES, Victim
from robustfpd.benchmark.machine import synchroniser
from robustfpd.benchmark.peers import OURS, PEERS, Work, foolbox_pgd
from robustfpd.benchmark.result import Bar, Entry, Measure, Spread, Workload
from robustfpd.benchmark.scale import Scale
from robustfpd.benchmark.timing import Contender, Pace, interleave
from robustfpd.evaluation import evaluate
from robustfpd.rng import generator

MEMBERS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""AutoAttack's `standard`."""
LIBRARIES = "libraries, one after another"
PGD_STEPS = 20
BATCH = 64
SPEED_BAR = 3.0


def suite_workload(scale: Scale, pace: Pace, target: Victim) -> Workload:
    """Time both, once where that takes long, and count passes."""
    work = target.work(min(scale.suite_images, len(target.images)), PGD_STEPS, "linf")
    group = f"suite {scale.suite}, {len(work.images)} images, {NAMES['linf']}, eps {work.eps:g}: {target.name}"
    out = [name for name in ("foolbox", "pyautoattack") if importlib.util.find_spec(PEERS[name].package) is None]
    if out:
        missing = [Entry(name=name, missing="not installed") for name in out]
        return Workload(group=group, entries=tuple(missing), notes=("needs pip install 'robustfpd[attacks]'",))
    counted = QueryCounter(work.classifier).eval()
    theirs = replace(work, classifier=counted)

    def libraries() -> Tensor:
        counted.reset()
        with redirect_stdout(io.StringIO()):  # they print
            return _libraries(theirs, scale)

    def ours() -> Any:
        return evaluate(work.classifier, (work.images, work.labels), suite=scale.suite, eps=work.eps, batch_size=BATCH)

    with preserve_state(work.classifier), reproducible(generator(0, "benchmark")):
        contenders = [Contender(OURS, ours), Contender(LIBRARIES, libraries)]
        timing = interleave(
            contenders, replace(pace, least=1), synchronise=synchroniser(work.images.device), warm_ups=0
        )
    record, standing = timing.returned[OURS], timing.returned[LIBRARIES]
    robust, images = float(standing.float().mean()), len(work.images)
    lost = record.robust_accuracy - robust
    entries = (
        Entry(
            name=OURS, seconds=timing.spread(OURS), ratio=timing.ratio(OURS, LIBRARIES),
            accuracy=record.robust_accuracy, forward=record.forward_passes / images,
        ),
        Entry(
            name=LIBRARIES, seconds=timing.spread(LIBRARIES), ratio=timing.ratio(LIBRARIES, LIBRARIES),
            accuracy=robust, forward=counted.forward_passes / images, backward=counted.backward_passes / images,
        ),
    )  # fmt: skip
    measures = (
        Measure(what="libraries / ours", value=timing.ratio(LIBRARIES, OURS), bar=Bar(at_least=SPEED_BAR)),
        Measure(
            what="worst case, ours - libraries", value=Spread(median=lost, low=lost, high=lost), unit="points",
            bar=Bar(at_most=0.0),
        ),
    )  # fmt: skip
    return Workload(group=group, reference=LIBRARIES, entries=entries, measures=measures)


def _libraries(work: Work, scale: Scale) -> Tensor:
    """Which images withstand FGSM and PGD (foolbox) and AutoAttack's members, each tried on all; N."""
    standing = _right(work.classifier, work.images, work.labels)
    for attack in (_fgsm, _pgd, *(_member(name, scale) for name in MEMBERS)):
        standing &= _right(work.classifier, attack(work), work.labels)
    return standing


def _fgsm(work: Work) -> Tensor:
    from foolbox import PyTorchModel
    from foolbox.attacks import LinfFastGradientAttack

    model = PyTorchModel(work.classifier, bounds=(0, 1), device=work.images.device)
    parts = zip(torch.split(work.images, BATCH), torch.split(work.labels, BATCH), strict=True)
    return torch.cat([LinfFastGradientAttack().run(model, x, y, epsilon=work.eps) for x, y in parts])


def _pgd(work: Work) -> Tensor:
    parts = zip(torch.split(work.images, BATCH), torch.split(work.labels, BATCH), strict=True)
    return torch.cat([foolbox_pgd(replace(work, images=x, labels=y))() for x, y in parts])


def _member(name: str, scale: Scale) -> Callable[[Work], Tensor]:
    """A member of AutoAttack alone, as its `standard` sets it up."""

    def run(work: Work) -> Tensor:
        from pyautoattack import AutoAttack

        peer = AutoAttack(
            work.classifier, attacks=[name], norm="Linf", eps=work.eps, seed=0, version="custom",
            device=work.images.device,
        )  # fmt: skip
        peer.apgd.n_restarts = peer.fab.n_restarts = peer.apgd_targeted.n_restarts = 1
        peer.apgd.n_iter = peer.apgd_targeted.n_iter = peer.fab.n_iter = scale.apgd_steps
        peer.square.n_queries = scale.queries
        targets = min(9, work.classes - 1)
        peer.fab.n_target_classes = peer.apgd_targeted.n_target_classes = targets
        found, _ = peer.run_standard_evaluation(work.images, work.labels, batch_size=BATCH)
        adversarial: Tensor = found
        return adversarial

    return run


@torch.no_grad()
def _right(classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return torch.cat([classifier(x) for x in torch.split(images, BATCH)]).argmax(dim=1) == labels
