"""Estimate the cost of an evaluation: evaluate a few images, and simulate the attacks on all images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.attacks import adaptive
from robustfpd.attacks.base import preserve_state
from robustfpd.config import Norm
from robustfpd.device import timed
from robustfpd.distributed import ProcessGroup
from robustfpd.evaluation import checks, inputs, suites
from robustfpd.evaluation.attack_runner import AttackOutcome, AttackRunner
from robustfpd.evaluation.evaluator import evaluate
from robustfpd.evaluation.inputs import CPU_BATCH_SIZE, Data, EvaluationData, device_of
from robustfpd.evaluation.ledger import CLEAN, Ledger, LedgerRow
from robustfpd.evaluation.loop import EvaluationLoop, EvaluationObserver, EvaluationSettings
from robustfpd.evaluation.record import EvaluationRecord
from robustfpd.evaluation.suites import AttackSpec, SuiteContext
from robustfpd.evaluation.time_limit import TimeLimit
from robustfpd.rng import generator

FEW_IMAGES = 8  # photographs on a CPU, and expensive suites
TYPICAL = 0.5  # share of all iterations that attacks take: most images are misclassified before
MINUTES = 2.0
"""The images are attacked for at most about this time."""


@dataclass(frozen=True)
class AttackEstimate:
    """Estimated cost of one attack at all radii."""

    spec: AttackSpec
    images: int
    """Images that it is run on, once for each radius."""
    seconds: float
    forward_passes: int
    backward_passes: int


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of an evaluation."""

    attacks: tuple[AttackEstimate, ...]
    seconds: float
    """Of attacks, checks and preparations."""
    check_seconds: float
    forward_passes: int
    backward_passes: int
    attacked: int
    """Images that were attacked for the estimate."""
    spent: float
    """Seconds that they took."""
    not_reached: tuple[str, ...]
    """Attacks that were not reached at all radii, whose cost is an upper bound, and checks, whose cost is left out."""


def estimate(classifier: nn.Module, data: Data, *, num_images: int | None, **settings: Any) -> Estimate:
    """Estimate the time and the passes of `evaluate` with the same arguments.

    Evaluates a batch of the images, at most about two minutes. The attacks on all images are then simulated: each
    image behaves as one of those that were evaluated, so that the suite, its shares and audit decide how many
    images each attack is run on.

    Raises:
        InputError: as `evaluate`.
    """
    seed = settings.get("seed", 0)
    whole = inputs.gather(data, num_images, seed)
    device = device_of(classifier, whole.images)
    batch_size = settings.get("batch_size", "auto")
    auto = inputs.auto_batch_size(whole.images, device, inputs.block_size(len(whole.images), None))
    chosen = auto if batch_size == "auto" else batch_size
    speed = Speed.measure(classifier, whole.images, chosen)
    most = FEW_IMAGES if device.type == "cpu" and auto < CPU_BATCH_SIZE else max(chosen, CPU_BATCH_SIZE)
    few = inputs.gather((whole.images, whole.labels), _affordable(classifier, whole, speed, settings, most), seed)
    start = time.perf_counter()
    record = evaluate(
        classifier, (few.images, few.labels), max_minutes=MINUTES, gallery=0, **{**settings, "batch_size": batch_size}
    )
    spent = time.perf_counter() - start
    made = [c for c in record.verdict.checks if c.name in checks.BEFORE_ATTACKS]
    specs = planned_attacks(
        classifier, few.images, record.suite, record.norm, record.surrogates, randomised=checks.is_random(made)
    )
    runner = _SimulatedRunner(record, few, len(whole.images), chosen, device, speed)
    plan = EvaluationSettings(
        record.suite, tuple(w.eps for w in record.worst_case), record.norm, seed, batch_size, "fp32",
        record.every_attack, record.model_name, (),
    )  # fmt: skip
    group = ProcessGroup.current()
    loop = EvaluationLoop(
        plan, runner, {}, Ledger(), group, EvaluationObserver(), None, TimeLimit(None, group)
    )  # fmt: skip
    correct = loop.classify()
    skip = not record.every_attack and all(c.outcome in ("passed", "skipped") for c in made)
    loop.attack_all(specs, correct, [], skip=skip)
    probes = suites.suite(record.suite).probes
    more = max(min(probes, int(correct.sum())), 1) / max(min(probes, record.clean.count), 1)
    check_seconds = max(spent - sum(row.seconds for row in record.ledger), 0) * more
    rows = loop.ledger.rows
    return Estimate(
        tuple(_of_attack(spec, rows) for spec in specs),
        sum(row.seconds for row in rows) / group.world_size + check_seconds, check_seconds,
        sum(row.queries for row in rows) + round(more * record.check_forward_passes),
        sum(row.gradients for row in rows) + round(more * record.check_backward_passes),
        record.num_images, spent, _not_reached(record),
    )  # fmt: skip


def _affordable(
    classifier: nn.Module, data: EvaluationData, speed: Speed, settings: Mapping[str, Any], most: int
) -> int:
    """Return how many images to evaluate: as many as typically fit into the time, from `FEW_IMAGES` to `most`."""
    norm, eps = settings.get("norm", "linf"), settings.get("eps", 8 / 255)
    specs = planned_attacks(
        classifier, data.images, settings.get("suite", "quick"), norm, tuple(settings.get("surrogates") or ()),
        randomised=False,
    )  # fmt: skip
    seconds = speed.of_image(most) * sum(spec.iterations for spec in specs) * len(inputs.check_radii(eps, norm))
    return max(FEW_IMAGES, min(int(60 * MINUTES / (TYPICAL * seconds)), most))


def _of_attack(spec: AttackSpec, rows: list[LedgerRow]) -> AttackEstimate:
    own = [row for row in rows if row.attack == spec.label]
    return AttackEstimate(
        spec, len(own), sum(r.seconds for r in own), sum(r.queries for r in own), sum(r.gradients for r in own)
    )


def planned_attacks(
    classifier: nn.Module, images: Tensor, suite: str, norm: Norm, surrogates: Sequence[str], *, randomised: bool
) -> list[AttackSpec]:
    """Return the attacks that a suite runs on a classifier; `images` are on the CPU."""
    module = adaptive.as_classifier(classifier)
    with preserve_state(module):
        views = adaptive.adaptive_views(module, images[:4].to(device_of(module, images)))
    return suites.attack_specs(suite, SuiteContext(norm, tuple(views), surrogates, randomised))


def _not_reached(record: EvaluationRecord) -> tuple[str, ...]:
    left = [a.attack for a in record.attacks if a.not_attacked and not a.attacked]
    left += [c.name for c in record.verdict.checks if c.evidence == checks.NOT_MADE]
    return tuple(dict.fromkeys(left))


@dataclass(frozen=True)
class Speed:
    """Seconds of a gradient of a batch: `fixed` and `per_image`."""

    fixed: float
    per_image: float
    forward: float
    """Seconds of a forward pass of an image."""

    @classmethod
    def measure(cls, classifier: nn.Module, images: Tensor, batch_size: int) -> Speed:
        """Time batches of one image and of `batch_size` images."""
        device, count = device_of(classifier, images), min(batch_size, len(images))

        def gradient(batch: Tensor) -> None:
            with torch.enable_grad():
                torch.autograd.grad(classifier(batch.requires_grad_()).sum(), batch, allow_unused=True)

        def forward(batch: Tensor) -> None:
            with torch.no_grad():
                classifier(batch)

        one, several = images[:1].to(device), images[:count].to(device)
        with preserve_state(classifier):
            try:
                small, large = timed(lambda: gradient(one), device), timed(lambda: gradient(several), device)
            except RuntimeError:  # no gradients
                small, large = timed(lambda: forward(one), device), timed(lambda: forward(several), device)
            passed = timed(lambda: forward(several), device) / count
        per_image = max(large - small, 0) / max(count - 1, 1) or large / count
        return cls(max(small - per_image, 0), per_image, passed)

    def of_image(self, batch: int) -> float:
        """Return the seconds of an image in a batch of `batch` images."""
        return self.fixed / batch + self.per_image

    def ratio(self, batch: int, other: int) -> float:
        """Return the time of an image in a batch of `batch` images over that in one of `other` images."""
        return self.of_image(batch) / self.of_image(other)


class _SimulatedRunner(AttackRunner):
    """Returns the rows of an evaluation of a few images as those of many images.

    Args:
        record: the evaluation.
        few: its images.
        count: number of images to simulate.
        batch_size: images per forward pass.
        device: device of the classifier.
        speed: speed of the classifier.
    """

    def __init__(
        self, record: EvaluationRecord, few: EvaluationData, count: int, batch_size: int, device: torch.device,
        speed: Speed,
    ) -> None:  # fmt: skip
        ids = [row.image for row in record.ledger if row.attack == CLEAN]
        self.source = [ids[i % len(ids)] for i in torch.randperm(count, generator=generator(record.seed, "estimate"))]
        self.known: dict[tuple[str, float], dict[int, LedgerRow]] = {}
        for row in record.ledger:
            self.known.setdefault((row.attack, row.eps), {})[row.image] = row
        clean = self.known[CLEAN, 0.0]
        labels = torch.tensor([clean[image].label for image in self.source])
        images = few.images[:1].expand(count, *few.images.shape[1:])
        data = EvaluationData(images, labels, torch.arange(count))
        super().__init__(nn.Identity(), data, device, record.norm, record.seed, batch_size)
        self.speed = speed

    def classify(self, indices: Tensor) -> AttackOutcome:
        """Return the rows of clean images."""
        return self._rows_of(CLEAN, 0.0, indices, None)

    def run(self, spec: AttackSpec, eps: float, indices: Tensor) -> AttackOutcome:
        """Return the rows of an attack."""
        return self._rows_of(spec.label, eps, indices, spec)

    def _rows_of(self, label: str, eps: float, indices: Tensor, spec: AttackSpec | None) -> AttackOutcome:
        smaller = [radius for attack, radius in self.known if attack == label and radius <= eps]
        known = self.known[label, max(smaller)] if smaller else {}  # the time ended before a larger radius
        others = list(known.values())
        ratio = self.speed.ratio(*(min(count, self.batch_size) for count in (len(indices), max(len(known), 1))))
        rows = []
        for i in indices.tolist():
            row = known.get(self.source[i]) or (others[i % len(others)] if others else self._bound(spec, eps, i))
            rows.append(row.model_copy(update={"image": i, "eps": eps, "seconds": row.seconds * ratio}))
        return AttackOutcome(rows)

    def _bound(self, spec: AttackSpec | None, eps: float, index: int) -> LedgerRow:
        """Return the row of an attack that was not reached: the image survives after all iterations."""
        assert spec is not None
        clean, differentiates = self.known[CLEAN, 0.0][self.source[index]], attacks.get(spec.attack).access
        per_pass = self.speed.per_image if differentiates == "gradients" else self.speed.forward
        changes: Mapping[str, Any] = {
            "attack": spec.label, "eps": eps, "queries": spec.iterations, "seconds": per_pass * spec.iterations,
            "gradients": spec.iterations if differentiates == "gradients" else 0,
        }  # fmt: skip
        return clean.model_copy(update=changes)
