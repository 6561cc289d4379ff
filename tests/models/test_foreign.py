from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from robustfpd import models
from robustfpd.config import ModelConfig, TaskConfig, parse
from robustfpd.errors import InputError
from robustfpd.models.foreign import find, foreign

MODULE = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.maxpool = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.MaxPool2d(2)
        for i in range(1, 5):
            setattr(self, f"layer{i}", nn.Sequential(nn.Conv2d(4, 4, 3, stride=1 + (i > 2), padding=1), nn.ReLU()))
        self.fc = nn.Linear(4, 9)
    def forward(self, x):
        x = self.maxpool(self.conv1(x))
        for i in range(1, 5):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(x.mean(dim=(2, 3)))

one = Tiny()
with torch.no_grad():
    one.conv1.weight.fill_(0.25)

def make():
    return one

def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))

def broken():
    raise OSError("weights.pt is not there")
"""
TASK = TaskConfig(num_classes=3, in_channels=3, image_size=(16, 16))


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.delitem(sys.modules, "tinynets", raising=False)
    (tmp_path / "tinynets.py").write_text(MODULE)


def _config(backbone: str, **values: object) -> ModelConfig:
    return parse(ModelConfig, {"backbone": backbone, "pyramid_channels": 8, "denoise": "softmax", **values})


@pytest.mark.parametrize("defence", ["fpd", "none"])
def test_a_named_network_is_wrapped_with_its_weights_and_loads_again(tmp_path: Path, defence: str) -> None:
    model = models.build(TASK, _config("tinynets:make", defence=defence)).eval()
    weights = {name: value for name, value in model.state_dict().items() if name.endswith("conv1.weight")}
    assert weights
    assert all(bool((value == 0.25).all()) for value in weights.values())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)
    assert bool((sys.modules["tinynets"].one.conv1.weight == 0.25).all())  # a copy was taken
    model.save(tmp_path / "model")
    x = torch.rand(2, 3, 16, 16)
    again = models.load(tmp_path / "model")
    assert torch.equal(again.classifier()(x), model.classifier()(x))


def test_loading_looks_where_one_works_and_never_in_the_models_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.build(TASK, _config("tinynets:make")).save(tmp_path / "model")
    (tmp_path / "tinynets.py").rename(tmp_path / "model" / "tinynets.py")
    monkeypatch.delitem(sys.modules, "tinynets")
    with pytest.raises(InputError, match=r"tinynets cannot be imported from here: .* there is no 'tinynets' in "):
        models.load(tmp_path / "model")


@pytest.mark.parametrize(("backbone", "values", "message"), [
    ("tinynets:", {}, "model.backbone must be package.module:factory, found 'tinynets:'"),
    ("tinynet:make", {}, "tinynet cannot be imported from here"),
    ("tinynets:mak", {}, "unknown name in tinynets 'mak'; did you mean 'make'"),
    ("tinynets:broken", {}, r"tinynets:broken\(\) raised OSError: weights.pt is not there"),
    ("tinynets:flat", {}, "stages must name the modules of Sequential where its stages end"),
    ("tinynets:make", {"pretrained": True}, "your own module brings its own"),
])  # fmt: skip
def test_what_cannot_be_wrapped_is_refused_by_name(backbone: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.build(TASK, _config(backbone, **values))


def test_stages_of_a_resnet_are_found_and_others_can_be_named() -> None:
    net = foreign("tinynets:make")
    assert models.enhance(net, num_classes=3, image_size=16, pyramid_channels=8).backbone is not net
    named = _config("tinynets:make", stages=("layer1", "layer2", "layer4"))
    assert models.build(TASK, named)(torch.rand(2, 3, 16, 16)).logits.shape == (2, 3)


def test_finding_a_name_imports_nothing() -> None:
    assert find("tinynets:make", "--model") == ("tinynets", "make")
    assert "tinynets" not in sys.modules
