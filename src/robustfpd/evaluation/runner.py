"""Runs a suite against a classifier: worst case per image, attacking only what still stands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustfpd import attacks
from robustfpd.attacks import adaptive
from robustfpd.attacks.inputs import check_eps, check_images, check_labels, check_logits
from robustfpd.attacks.norms import geometry
from robustfpd.config import Norm
from robustfpd.data import ImageSet
from robustfpd.errors import InputError
from robustfpd.evaluation.record import AttackResult, EvaluationRecord, LedgerRow, Proportion, WorstCase
from robustfpd.evaluation.suite import Planned, plan
from robustfpd.models.mode import evaluating
from robustfpd.provenance import environment, weights_sha256
from robustfpd.seeding import generator

OUTSIDE = 1e-5
"""How far, by rounding, an adversarial image may lie outside its ball; more in half precision."""


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
    data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
    *,
    suite: str = "quick",
    eps: float | Sequence[float] = 8 / 255,
    norm: Norm = "linf",
    num_images: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    every_attack: bool = False,
    subject: str = "classifier",
    observer: EvaluationObserver | None = None,
) -> EvaluationRecord:
    """Attack a classifier and count what withstands.

    An image that has fallen to one attack, or at a smaller radius, is not attacked again: the smaller
    perturbation lies in the larger ball. Attacks that know the defence join when the classifier is an FPD.

    Args:
        classifier: images N×C×H×W in [0, 1] → logits N×K, or one of our models.
        data: (images, labels), or a loader of such batches.
        suite: name of a suite.
        eps: radius or radii, in pixels of [0, 1].
        norm: `linf`, `l2` or `l1`.
        num_images: how many images, drawn by `seed`; None takes all.
        seed: seed of the choice of images and of the attacks.
        batch_size: images per forward pass.
        every_attack: try every attack on every image that is classified rightly, for a curve per attack;
            costs more. Random starts then differ, as they are drawn per batch.
        subject: what the record calls the classifier.
        observer: callback for a live display.

    Raises:
        InputError: unusable images, labels, radii, suite or classifier, or an attack that leaves its ball.
    """
    classifier = adaptive.as_classifier(classifier)
    several = eps if isinstance(eps, Iterable) and getattr(eps, "ndim", None) != 0 else [eps]
    radii = sorted({check_eps(e, norm) for e in several})
    if not radii:
        raise InputError("eps must hold at least one radius, found none")
    geometry(norm)
    images, labels, numbers = _gather(data, num_images, seed)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, found {batch_size}")
    run = _Run(
        classifier, images, labels, numbers, norm, seed, batch_size, every_attack, observer or EvaluationObserver()
    )
    with evaluating(classifier):
        return run.record(plan(suite, classifier, norm), radii, suite, subject)


class _Run:
    """State of one evaluation."""

    def __init__(
        self, classifier: nn.Module, images: Tensor, labels: Tensor, numbers: Tensor, norm: Norm, seed: int,
        batch_size: int, every_attack: bool, observer: EvaluationObserver,
    ) -> None:  # fmt: skip
        self.classifier, self.images, self.labels, self.norm = classifier, images, labels, norm
        self.numbers = numbers
        self.seed, self.batch_size, self.every_attack, self.observer = seed, batch_size, every_attack, observer
        parameter = next(classifier.parameters(), None)
        self.device = parameter.device if parameter is not None else images.device
        self.views = adaptive.views(classifier)
        self.ledger: list[LedgerRow] = []

    def record(self, planned: Sequence[Planned], radii: Sequence[float], suite: str, subject: str) -> EvaluationRecord:
        self.clean = self._predict(self.images)
        correct = self.clean == self.labels
        standing = correct.clone()
        results: list[AttackResult] = []
        worst: list[WorstCase] = []
        for eps in radii:
            for attack in planned:
                done = len(results) + 1
                self.observer.on_stage(Stage(attack.label, eps, done, len(radii) * len(planned), int(standing.sum())))
                tried = torch.nonzero(correct if self.every_attack else standing).flatten()
                result, fallen = self._attack(attack, eps, tried)
                standing[fallen] = False
                results.append(result)
            worst.append(WorstCase(eps=eps, robust=Proportion.of(int(standing.sum()), len(self.labels))))
        return EvaluationRecord(
            subject=subject, suite=suite, norm=self.norm, seed=self.seed,
            clean=Proportion.of(int(correct.sum()), len(self.labels)), worst_case=tuple(worst), attacks=tuple(results),
            ledger=tuple(self.ledger), data_sha256=_digest(self.images, self.labels), batch_size=self.batch_size,
            every_attack=self.every_attack, weights_sha256=weights_sha256(self.classifier),
            environment=environment(self.device),
        )  # fmt: skip

    def _attack(self, planned: Planned, eps: float, tried: Tensor) -> tuple[AttackResult, Tensor]:
        """Run one attack on the images `tried`; return its result and the indices that fell."""
        start, fallen = time.perf_counter(), []
        attack, view = attacks.get(planned.attack), self.views[planned.view]
        draws = generator(self.seed, planned.label, repr(eps))
        for indices in torch.split(tried, self.batch_size):
            if len(indices) == 0:
                continue
            x, y = self.images[indices].to(self.device), self.labels[indices].to(self.device)
            adversarial = attack(view, x, y, eps=eps, norm=self.norm, generator=draws, **planned.options)
            distance = geometry(self.norm).size(adversarial - x).cpu()
            self._check_ball(planned, eps, adversarial, distance)
            prediction = self._predict(adversarial)
            fallen.append(indices[prediction != self.labels[indices]])
            self._note(planned, eps, indices, prediction, distance)
        lost = torch.cat(fallen) if fallen else torch.empty(0, dtype=torch.long)
        alone = Proportion.of(len(tried) - len(lost), len(self.labels)) if self.every_attack else None
        seconds = time.perf_counter() - start
        return AttackResult(
            attack=planned.label, eps=eps, attacked=len(tried), fooled=len(lost), accuracy=alone, seconds=seconds
        ), lost

    def _check_ball(self, planned: Planned, eps: float, adversarial: Tensor, distance: Tensor) -> None:
        rounding = max(OUTSIDE, torch.finfo(adversarial.dtype).eps)
        inside = float(distance.max()) <= eps * (1 + rounding) + rounding
        if not inside or float(adversarial.min()) < 0 or float(adversarial.max()) > 1:
            raise InputError(
                f"attack {planned.label} left the {self.norm} ball of radius {eps}: "
                f"distance {float(distance.max()):.6g}, "
                f"pixels in [{float(adversarial.min()):.4g}, {float(adversarial.max()):.4g}]; it does not count"
            )

    def _note(self, planned: Planned, eps: float, indices: Tensor, prediction: Tensor, distance: Tensor) -> None:
        for i, p, d in zip(indices.tolist(), prediction.tolist(), distance.tolist(), strict=True):
            self.ledger.append(
                LedgerRow(
                    image=int(self.numbers[i]), label=int(self.labels[i]), clean_prediction=int(self.clean[i]),
                    attack=planned.label, eps=eps, adversarial_prediction=p, distance=d,
                )
            )  # fmt: skip

    @torch.no_grad()
    def _predict(self, images: Tensor) -> Tensor:
        """Classes the classifier itself gives, whatever view was attacked."""
        parts = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size].to(self.device)
            logits = self.classifier(batch)
            parts.append(check_logits(logits, self.labels.max().expand(len(batch))).argmax(dim=1).cpu())
        return torch.cat(parts)


def _gather(
    data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]], num_images: int | None, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and their places in `data`, checked; `num_images` drawn by the seed, in their own order."""
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor):
        images, labels = data
    else:
        pairs = [(x, y) for x, y in data]
        if not pairs:
            raise InputError("data must hold at least one image, found none")
        images, labels = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    images = check_images(images).detach().cpu()
    labels = check_labels(labels, len(images)).cpu()
    if num_images is None or num_images >= len(images):
        return images, labels, torch.arange(len(images))
    if num_images < 1:
        raise InputError(f"num_images must be at least 1, found {num_images}")
    chosen = torch.randperm(len(images), generator=generator(seed, "images"))[:num_images].sort().values
    return images[chosen], labels[chosen], chosen


def _digest(images: Tensor, labels: Tensor) -> str:
    return ImageSet((images * 255).round().to(torch.uint8), labels).digest()
