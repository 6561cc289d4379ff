from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from robustfpd.config import RunConfig
from robustfpd.evaluation import AttackResult, EvaluationRecord, Proportion, WorstCase
from robustfpd.report.figures import GalleryRow
from robustfpd.report.html import Gallery, Subject
from robustfpd.training import EpochMetrics

MakeRecord = Callable[..., EvaluationRecord]


@pytest.fixture
def make_record() -> MakeRecord:
    """A record of `subject` with these numbers of robust images at eps 0.1, 0.2, …, of 200."""

    def make(
        subject: str,
        robust: tuple[int, ...] = (150, 60),
        clean: int = 190,
        attacks: tuple[str, ...] = ("FGSM", "PGD-40"),
    ) -> EvaluationRecord:
        radii = [(i + 1) / 10 for i in range(len(robust))]
        alone = [
            AttackResult(
                attack=name, eps=eps, attacked=clean, fooled=clean - count - i, accuracy=Proportion.of(count + i, 200),
                seconds=0.1,
            )
            for eps, count in zip(radii, robust, strict=True)
            for i, name in enumerate(attacks)
        ]  # fmt: skip
        return EvaluationRecord(
            subject=subject, suite="quick", norm="linf", seed=7, clean=Proportion.of(clean, 200),
            worst_case=tuple(
                WorstCase(eps=eps, robust=Proportion.of(count, 200)) for eps, count in zip(radii, robust, strict=True)
            ),
            attacks=tuple(alone), batch_size=64, every_attack=True, data_sha256="0123456789abcdef" * 4,
            environment={"python": "3.11.9", "packages": {"torch": "2.11.0", "timm": None}, "git_revision": None},
        )  # fmt: skip

    return make


@pytest.fixture
def history() -> list[EpochMetrics]:
    return [
        EpochMetrics(
            epoch=i, ce=1.0, restoration=0.1, second_ce=1.0, second_restoration=0.1, gate_open=1.0, train_accuracy=0.5,
            adversarial_ce=None, train_adversarial_accuracy=None, validation_robust_accuracy=None,
            validation_accuracy=0.3 + 0.2 * i, validation_ce=1.0, validation_restoration=0.1, lr=1e-3,
            images_per_second=100.0, seconds=1.0,
        )
        for i in range(3)
    ]  # fmt: skip


@pytest.fixture
def gallery() -> Gallery:
    images = torch.rand(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rows = tuple(GalleryRow(tuple(row), ("3, right", "5, wrong (is 3)")) for row in images)
    return Gallery(("clean", "adversarial"), rows, "Two test images & what was seen")


@pytest.fixture
def make_subject(make_record: MakeRecord, history: list[EpochMetrics]) -> Callable[..., Subject]:
    def make(name: str, robust: tuple[int, ...] = (150, 60)) -> Subject:
        return Subject(RunConfig(recipe=f"recipe of {name}"), history, make_record(name, robust))

    return make
