from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from robustfpd import data
from robustfpd.config import recipe
from robustfpd.models.heads import ClassificationLayer
from robustfpd.training import train
from robustfpd.training.cost import stage_cost

TINY = ("training.epochs=2", "training.batch_size=32", "data.train_limit=64", "model.pyramid_channels=8",
        "training.threshold=1000", "adversarial.epochs=2", "adversarial.batch_size=32", "adversarial.start=scratch",
        "adversarial.eps=0.1", "adversarial.select_images=20", "training.early_stop_patience=null",
        "adversarial.early_stop_patience=null")  # fmt: skip


@pytest.mark.parametrize(("stage", "plain", "settings"), [
    ("two-phase", False, ()), ("two-phase", True, ()),
    ("adversarial", False, ("adversarial.steps=2", "adversarial.start_epoch=1")),
    ("adversarial", False, ("adversarial.attack=fgsm", "adversarial.batch=halves", "adversarial.labels='true'")),
    ("adversarial", True, ("adversarial.steps=2", "adversarial.select_by=clean")),
])  # fmt: skip
def test_the_passes_told_are_those_of_a_training_with_an_open_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, plain: bool, settings: tuple[str, ...]
) -> None:
    run = recipe("digits/mini", [*TINY, *settings]).model_copy(update={"stage": stage})
    run = run.baseline() if plain else run
    counts = data.count(run.data)
    seen, back, original = [0], [0], ClassificationLayer.pre_squash

    def came_back(gradient: Tensor) -> None:
        back[0] += len(gradient)

    def counting(self: ClassificationLayer, features: Tensor) -> Tensor:
        seen[0] += len(features)
        logits = original(self, features)
        if logits.requires_grad:
            logits.register_hook(came_back)  # type: ignore[no-untyped-call]
        return logits

    monkeypatch.setattr(ClassificationLayer, "pre_squash", counting)
    train(run, tmp_path / "run", device="cpu")
    told = stage_cost(run, counts.info.task, counts.train, counts.validation)
    looks = 2 * 2  # whether the network overflows, when it is built
    assert told.forward * 0.85 <= seen[0] - looks <= told.forward
    assert told.backward * 0.85 <= back[0] <= told.backward, (back, told)
