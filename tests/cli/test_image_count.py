from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustfpd.cli.image_count import FEWEST, affordable
from robustfpd.config import EvaluationConfig
from robustfpd.evaluation.estimate import Speed
from robustfpd.evaluation.ledger import LedgerRow, write_rows


class Mean(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        means: Tensor = images.flatten(2).mean(dim=2)
        return means


def _count(monkeypatch: pytest.MonkeyPatch, path: Path, gradient: float, size: int = 96, **plan: Any) -> Any:
    """The choice for 500 images on which a gradient takes `gradient` seconds."""
    monkeypatch.setattr(Speed, "measure", lambda *args: Speed(0.0, gradient, gradient / 3))
    data = torch.rand(1, 3, size, size).expand(500, 3, size, size), torch.zeros(500, dtype=torch.long)
    options = {"classifier": Mean(), "data": data, "surrogates": {}}
    return affordable(options, EvaluationConfig(**plan), path, time.perf_counter())


def test_photographs_on_a_cpu_are_as_many_as_the_time_allows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counts = [_count(monkeypatch, tmp_path / "r.json", gradient) for gradient in (1e-3, 0.03, 0.1, 10.0)]
    assert [c.num_images for c in counts][::3] == [500, FEWEST]
    assert 500 > counts[1].num_images > counts[2].num_images > FEWEST
    assert counts[0].max_minutes is None
    assert counts[0].reason == ""
    for slow in counts[1:]:
        assert slow.max_minutes == pytest.approx(9, abs=0.1)
        assert f"takes {slow.num_images} of 500 images" in slow.reason
        assert "--num-images 500 takes all" in slow.reason
    more_radii = _count(monkeypatch, tmp_path / "r.json", 0.03, eps=(0.01, 0.02))
    assert more_radii.num_images == pytest.approx(counts[1].num_images / 2, abs=1)


@pytest.mark.parametrize("change", [{"size": 32}, {"suite": "standard"}, {"num_images": 12}])
def test_small_images_other_suites_and_few_images_are_left_as_they_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: dict[str, Any]
) -> None:
    count = _count(monkeypatch, tmp_path / "r.json", 10.0, **change)
    assert (count.num_images, count.max_minutes) == (change.get("num_images", 500), None)


@pytest.mark.parametrize(("earlier", "kept"), [(1.2, True), (0.6, True), (0.4, False), (2.5, False)])
def test_a_number_close_to_that_of_an_earlier_evaluation_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, earlier: float, kept: bool
) -> None:
    chosen = _count(monkeypatch, tmp_path / "r.json", 0.03).num_images
    row: dict[str, Any] = {
        "label": 0, "clean_prediction": 0, "attack": "clean", "eps": 0.0, "adversarial_prediction": 0, "distance": 0.0,
        "margin": 0.0, "outcome": "robust",
    }  # fmt: skip
    rows = [LedgerRow(image=i, **row) for i in range(int(earlier * chosen))]
    write_rows(tmp_path / "r.ledger.csv", [*rows, rows[0].model_copy(update={"attack": "FGSM", "eps": 0.1})])
    again = _count(monkeypatch, tmp_path / "r.json", 0.03).num_images
    assert again == (len(rows) if kept else chosen)
