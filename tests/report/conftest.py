from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.config import RunConfig
from robustfpd.evaluation import AttackResult, EvaluationRecord, Proportion, Verdict, WorstCase
from robustfpd.evaluation.gallery import GalleryImage, GalleryIndex
from robustfpd.report.html import write_report
from robustfpd.report.page import report_on
from robustfpd.report.sources import Source, StoredEvaluation, read
from robustfpd.training import EpochMetrics

MakeRecord = Callable[..., EvaluationRecord]
MakeSource = Callable[..., Source]


@pytest.fixture
def make_record() -> MakeRecord:
    """Makes a record of 200 images with these numbers of robust images at eps 0.1, 0.2, …"""

    def make(
        subject: str,
        robust: tuple[int, ...] = (150, 60),
        clean: int = 190,
        attacks: tuple[str, ...] = ("FGSM", "PGD-40"),
        **others: Any,
    ) -> EvaluationRecord:
        radii = [(i + 1) / 10 for i in range(len(robust))]
        alone = [
            AttackResult(
                attack=name, eps=eps, attacked=clean, misclassified=clean - count - i,
                accuracy=Proportion.of(count + i, 200), seconds=0.1,
            )
            for eps, count in zip(radii, robust, strict=True)
            for i, name in enumerate(attacks)
        ]  # fmt: skip
        values: dict[str, Any] = {
            "model_name": subject, "suite": "quick", "norm": "linf", "seed": 7, "clean": Proportion.of(clean, 200),
            "worst_case": tuple(
                WorstCase(eps=eps, robust=Proportion.of(count, 200)) for eps, count in zip(radii, robust, strict=True)
            ),
            "attacks": tuple(alone), "batch_size": 64, "every_attack": True, "data_sha256": "0123456789abcdef" * 4,
            "batch_size_auto": True, "search_precision": "fp32", "verdict": Verdict.of(()),
            "settings_sha256": "fedcba98" * 8,
            "environment": {"python": "3.11.9", "packages": {"torch": "2.11.0", "timm": None}, "git_revision": None},
        }  # fmt: skip
        return EvaluationRecord(**{**values, **others})

    return make


@pytest.fixture
def history() -> tuple[EpochMetrics, ...]:
    return tuple(
        EpochMetrics(
            epoch=i, ce=1.0, restoration=0.1, second_ce=1.0, second_restoration=0.1, gate_open=0.5 * i,
            train_accuracy=0.5, adversarial_ce=None, train_adversarial_accuracy=None, validation_robust_accuracy=None,
            validation_accuracy=0.3 + 0.2 * i, validation_ce=1.0, validation_restoration=0.1, lr=1e-3,
            images_per_second=100.0, seconds=1.0,
        )
        for i in range(3)
    )  # fmt: skip


@pytest.fixture
def make_source(make_record: MakeRecord, history: tuple[EpochMetrics, ...], tmp_path: Path) -> MakeSource:
    """A run with one evaluation, as a report reads it."""

    def make(name: str, robust: tuple[int, ...] = (150, 60), **others: Any) -> Source:
        evaluation = StoredEvaluation(
            tmp_path / name / "evaluation" / "x.json", make_record(name, robust, **others), None
        )
        return Source(name, tmp_path / name, (evaluation,), RunConfig(recipe=f"recipe of {name}"), history)

    return make


@pytest.fixture(scope="session")
def measured(digits: tuple[nn.Module, Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an evaluation of a trained network on digits, its ledger and pictures beside it."""
    net, images, labels = digits
    folder = tmp_path_factory.mktemp("measured")
    rf.evaluate(
        net, (images, labels), suite="quick", eps=(0.05, 0.1), out_dir=folder, model_name="a small network",
        class_names=[f"digit {i}" for i in range(10)],
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GalleryIndex]:
    """A gallery of 12 images of 224×224 pixels of noise, which does not compress."""
    folder = tmp_path_factory.mktemp("photographs") / "record.gallery"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    images = [
        GalleryImage(
            image=i, label=0, clean_prediction=0, adversarial_prediction=1, attack="PGD-40", eps=0.1, distance=0.1,
            misclassified=i < 6, margin=0.1, amplification=5.0,
        )
        for i in range(12)
    ]  # fmt: skip
    for image in images:
        for picture in image.pictures:
            (folder / image.file(picture)).symlink_to("noise.png")
    half = tuple(images[:6]), tuple(images[6:])
    return folder, GalleryIndex(settings_sha256="0" * 64, norm="linf", misclassified=half[0], robust=half[1])


@pytest.fixture(scope="session")
def report_page(measured: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an evaluation with another one as its comparison."""
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, report_on([read(measured), read(measured / "record.json")]))
    return path


@pytest.fixture(scope="session")
def measured_record(measured: Path) -> EvaluationRecord:
    return EvaluationRecord.load(measured / "record.json")
