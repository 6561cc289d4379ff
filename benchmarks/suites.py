"""Our suite, and the same attacks run one after another with their libraries, each on every image."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.attacks import NAMES, AttackedNetwork
from benchmarks.libraries import LIBRARIES, OURS, AttackCase, foolbox_pgd
from benchmarks.results import Bar, ImplementationResult, Measure, Workload
from benchmarks.sizes import BenchmarkSizes
from benchmarks.timing import Implementation, RoundLimits, interleave, quartiles, synchronizer
from robustfpd.attacks.base import QueryCounter, preserve_state, reproducible
from robustfpd.evaluation import evaluate
from robustfpd.rng import generator

MEMBERS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""Of AutoAttack's `standard`."""
SEQUENCE = "libraries, one after another"
PGD_STEPS = 20
BATCH = 64
SPEED_BAR = 3.0


def suite_workload(sizes: BenchmarkSizes, limits: RoundLimits, network: AttackedNetwork) -> Workload:
    """Time both and count their passes; one round where that exceeds the time limit."""
    case = network.case(min(sizes.suite_images, len(network.images)), PGD_STEPS, "linf")
    group = f"suite {sizes.suite}, {len(case.images)} images, {NAMES['linf']}, eps {case.eps:g}: {network.name}"
    missing = [n for n in ("foolbox", "pyautoattack") if importlib.util.find_spec(LIBRARIES[n].package) is None]
    if missing:
        entries = tuple(ImplementationResult(name=name, missing="not installed") for name in missing)
        return Workload(group=group, entries=entries, notes=("needs pip install 'robustfpd[attacks]'",))
    counter = QueryCounter(case.classifier).eval()

    def libraries() -> Tensor:
        counter.reset()
        with redirect_stdout(io.StringIO()):
            return _robust_to_all(replace(case, classifier=counter), sizes)

    def ours() -> Any:
        return evaluate(case.classifier, (case.images, case.labels), suite=sizes.suite, eps=case.eps, batch_size=BATCH)

    with preserve_state(case.classifier), reproducible(generator(0, "benchmark")):
        implementations = [Implementation(OURS, ours), Implementation(SEQUENCE, libraries)]
        synchronize = synchronizer(case.images.device)
        timing = interleave(implementations, replace(limits, least=1), synchronize=synchronize, warm_ups=0)
    record, images = timing.returned[OURS], len(case.images)
    robust = float(timing.returned[SEQUENCE].float().mean())
    entries = (
        ImplementationResult(
            name=OURS, seconds=timing.quartiles(OURS), ratio=timing.ratio(OURS, SEQUENCE),
            accuracy=record.robust_accuracy, forward=record.forward_passes / images,
        ),
        ImplementationResult(
            name=SEQUENCE, seconds=timing.quartiles(SEQUENCE), ratio=timing.ratio(SEQUENCE, SEQUENCE),
            accuracy=robust, forward=counter.forward_passes / images, backward=counter.backward_passes / images,
        ),
    )  # fmt: skip
    difference = quartiles([record.robust_accuracy - robust])
    measures = (
        Measure(what="libraries / ours", value=timing.ratio(SEQUENCE, OURS), bar=Bar(at_least=SPEED_BAR)),
        Measure(what="worst case, ours - libraries", value=difference, unit="points", bar=Bar(at_most=0.0)),
    )
    return Workload(group=group, reference=SEQUENCE, entries=entries, measures=measures)


def _robust_to_all(case: AttackCase, sizes: BenchmarkSizes) -> Tensor:
    """Return which images are robust to FGSM and PGD (foolbox) and AutoAttack's members, each run on all images; N."""
    robust = _correct(case.classifier, case.images, case.labels)
    for attack in (_fgsm, _pgd, *(_member(name, sizes) for name in MEMBERS)):
        robust &= _correct(case.classifier, attack(case), case.labels)
    return robust


def _fgsm(case: AttackCase) -> Tensor:
    from foolbox import PyTorchModel
    from foolbox.attacks import LinfFastGradientAttack

    model = PyTorchModel(case.classifier, bounds=(0, 1), device=case.images.device)
    return torch.cat([LinfFastGradientAttack().run(model, x, y, epsilon=case.eps) for x, y in _batches(case)])


def _pgd(case: AttackCase) -> Tensor:
    return torch.cat([foolbox_pgd(replace(case, images=x, labels=y))() for x, y in _batches(case)])


def _batches(case: AttackCase) -> zip[tuple[Tensor, Tensor]]:
    return zip(torch.split(case.images, BATCH), torch.split(case.labels, BATCH), strict=True)


def _member(name: str, sizes: BenchmarkSizes) -> Callable[[AttackCase], Tensor]:
    """One member of AutoAttack with the settings of `standard`."""

    def run(case: AttackCase) -> Tensor:
        from pyautoattack import AutoAttack

        attack = AutoAttack(
            case.classifier, attacks=[name], norm="Linf", eps=case.eps, seed=0, version="custom",
            device=case.images.device,
        )  # fmt: skip
        attack.apgd.n_restarts = attack.fab.n_restarts = attack.apgd_targeted.n_restarts = 1
        attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = sizes.apgd_steps
        attack.square.n_queries = sizes.queries
        targets = min(9, case.classes - 1)
        attack.fab.n_target_classes = attack.apgd_targeted.n_target_classes = targets
        adversarial: Tensor = attack.run_standard_evaluation(case.images, case.labels, batch_size=BATCH)[0]
        return adversarial

    return run


@torch.no_grad()
def _correct(classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return torch.cat([classifier(x) for x in torch.split(images, BATCH)]).argmax(dim=1) == labels
