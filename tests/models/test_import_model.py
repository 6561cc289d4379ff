from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from robustfpd import models
from robustfpd.config import ModelConfig, TaskConfig, parse
from robustfpd.errors import InputError
from robustfpd.models.import_model import find, import_model

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
    again = models.load(tmp_path / "model", trust_code=True)
    assert again.config.backbone == "tinynets:make"
    assert torch.equal(again.classifier()(x), model.classifier()(x))


def test_loading_searches_the_working_folder_and_never_the_models_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.build(TASK, _config("tinynets:make")).save(tmp_path / "model")
    (tmp_path / "tinynets.py").rename(tmp_path / "model" / "tinynets.py")
    monkeypatch.delitem(sys.modules, "tinynets")
    with pytest.raises(InputError, match=r"tinynets cannot be imported from here: .* there is no 'tinynets' in "):
        models.load(tmp_path / "model", trust_code=True)


def test_a_saved_model_runs_no_code_unless_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.build(TASK, _config("tinynets:make")).eval()
    model.save(tmp_path / "model")
    net = sys.modules["tinynets"].one
    monkeypatch.delitem(sys.modules, "tinynets")
    (tmp_path / "tinynets.py").write_text("open('ran', 'w')\n" + MODULE)
    said = r"the network in .*model is made by tinynets:make; loading executes that code: if you trust it, repeat with "
    with pytest.raises(InputError, match=said + r"--trust-code \(in Python trust_code=True\), or pass net="):
        models.load(tmp_path / "model")
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(models.load(tmp_path / "model", net=net)(x).logits, model(x).logits)
    assert "tinynets" not in sys.modules
    assert not (tmp_path / "ran").exists()
    models.load(tmp_path / "model", trust_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("named", ["http.server:test", "torchvision.models.resnet:resnet18", "torchvision:models"])
def test_nothing_of_the_standard_library_is_called_either(tmp_path: Path, named: str) -> None:
    models.build(TASK, _config("tinynets:make")).save(tmp_path / "model")
    settings = tmp_path / "model" / "config.json"
    settings.write_text(settings.read_text().replace("tinynets:make", named))
    with pytest.raises(InputError, match=f"is made by {named}; loading executes that code"):
        models.load(tmp_path / "model")


def test_torchvisions_networks_need_no_trust_and_never_come_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.build(TASK, _config("torchvision.models:resnet18")).save(tmp_path / "model")
    assert models.load(tmp_path / "model").config.backbone == "torchvision.models:resnet18"
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "model" / "torchvision").mkdir()
    (tmp_path / "model" / "torchvision" / "__init__.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path / "model")
    installed = [p for p in sys.path if not (Path(p) / "torchvision").exists()]
    for path in (installed, ["", *installed], [str(tmp_path / "model"), *installed]):
        monkeypatch.setattr(sys, "path", list(path))
        with pytest.raises(InputError, match="there is no 'torchvision' among the installed packages"):
            models.load(tmp_path / "model")
        assert sys.path == path
    assert not (tmp_path / "model" / "ran").exists()


@pytest.mark.parametrize(("backbone", "values", "message"), [
    ("tinynets:", {}, "model.backbone must be package.module:factory, found 'tinynets:'"),
    ("tinynet:make", {}, "tinynet cannot be imported from here"),
    ("tinynets:mak", {}, "unknown name in tinynets 'mak'; did you mean 'make'"),
    ("tinynets:broken", {}, r"tinynets:broken\(\) raised OSError: weights.pt is not there"),
    ("tinynets:flat", {}, "stages must name the modules of Sequential where its stages end"),
    ("tinynets:make", {"pretrained": True}, "your own module brings its own"),
])  # fmt: skip
def test_unsuitable_backbones_are_refused_by_name(backbone: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.build(TASK, _config(backbone, **values))


def test_stages_of_a_resnet_are_found_and_others_can_be_named() -> None:
    net = import_model("tinynets:make")
    assert models.enhance(net, num_classes=3, image_size=16, pyramid_channels=8).backbone is not net
    named = _config("tinynets:make", stages=("layer1", "layer2", "layer4"))
    assert models.build(TASK, named)(torch.rand(2, 3, 16, 16)).logits.shape == (2, 3)


def test_finding_a_name_imports_nothing() -> None:
    assert find("tinynets:make", "--model") == ("tinynets", "make")
    assert "tinynets" not in sys.modules


def test_the_search_path_is_restored(tmp_path: Path) -> None:
    before = list(sys.path)
    assert str(tmp_path) not in before
    find("tinynets:make", "--model")
    with pytest.raises(InputError, match="cannot be imported from here"):
        find("nonets:make", "--model")
    (tmp_path / "lazynets.py").write_text("def make():\n    import tinynets\n    return tinynets.one\n")
    assert isinstance(import_model("lazynets:make"), torch.nn.Module)  # what lies beside it is found while it is called
    with pytest.raises(InputError, match="raised OSError"):
        import_model("tinynets:broken")
    assert sys.path == before


def test_installed_packages_come_before_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise RuntimeError")
    (tmp_path / "colorsys.py").write_text("raise RuntimeError")
    sys.modules.pop("colorsys", None)
    with pytest.raises(InputError, match="unknown name in colorsys 'make'"):
        import_model("colorsys:make")


def test_submodules_are_attributes_of_the_package_and_the_zoo_needs_no_torch() -> None:
    code = (
        "import sys, robustfpd.models as m; assert m.checkpoint.CONFIG and m.zoo.names();"
        "assert 'torch' not in sys.modules;"
        "assert not hasattr(m, 'nonesuch'); assert {'__name__', '__file__', 'load'} <= set(dir(m))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
