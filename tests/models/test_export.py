from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tests.fpds import as_trained, gated
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.errors import InputError
from robustfpd.models import FPD, Baseline
from robustfpd.models import export as exporting
from robustfpd.models.export import Exported, Format, export
from robustfpd.provenance import weights_sha256

FORMATS: tuple[Format, ...] = ("onnx", "torch")
HEADS = ("tanh", "linear", "spectral", "orthogonal")
ON_MNIST = ("mnist/mini-fpd", "mnist/mini-fpd-adversarial")
DENOISE = ("normalised", "dot", "softmax", "gaussian", "bottleneck", "none")


def tiny(peeks: bool = False, **options: Any) -> FPD:
    """One convolution a stage, four channels wide."""
    values = gated(**{"num_classes": 4, "in_channels": 1, "image_size": 8, **options})
    return as_trained(rf.enhance(Net(values["in_channels"], peeks), stages=["a", "b", "c", "d"], **values)).eval()


class Net(nn.Module):
    """A small network; one that peeks at its classifier fails without, so that the backbone leaves it early."""

    def __init__(self, channels: int, peeks: bool = False) -> None:
        super().__init__()
        self.peeks = peeks
        self.a = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.c = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU())
        self.d = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU())
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.d(self.c(self.b(self.a(x)))).mean(dim=(2, 3))
        return cast(Tensor, self.last(x) @ self.last.weight if self.peeks else self.last(x))


def smallest(num_classes: int = 4) -> Baseline:
    """A baseline of one convolution, for what does not depend on the network."""
    task = rf.TaskConfig(num_classes=num_classes, in_channels=1, image_size=(8, 8))
    config = rf.ModelConfig(backbone="custom", stages=("0",), defence="none", denoise_after=(), activation="keep")
    return cast(Baseline, rf.build(task, config, net=nn.Sequential(nn.Conv2d(1, 3, 1))).eval())


def run_onnx(path: Path, images: Tensor) -> list[Tensor]:
    session = pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(found) for found in session.run(None, {"images": images.numpy()})]


def run_torch(path: Path, images: Tensor) -> list[Tensor]:
    return list(torch.export.load(path).module()(images))


def outputs_of(path: Path, format: Format, images: Tensor) -> list[Tensor]:
    return run_onnx(path, images) if format == "onnx" else run_torch(path, images)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, atol=1e-4 * max(1.0, float(expected.abs().max())), rtol=0)


def check(model: FPD, format: Format, path: Path, size: tuple[int, int], **options: Any) -> Exported:
    """Export with the restored images, and compare with the model itself for batches that export did not see."""
    made = export(model, path, format=format, restored=True, **options)
    for count in (1, 3, 7):
        images = torch.rand(count, model.task.in_channels, *size, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected = model(images)
        found = outputs_of(path, format, images)
        assert close(found[0], expected.logits)
        assert close(found[1], expected.restored)
    assert not list(path.parent.glob(".*"))
    return made


@pytest.mark.parametrize("name", ["digits/mini-fpd", *(pytest.param(n, marks=pytest.mark.slow) for n in ON_MNIST)])
def test_a_zoo_model_in_onnx_with_its_metadata(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = cast(FPD, rf.load(name))
    made = check(model, "onnx", tmp_path / "a.onnx", model.task.image_size, class_names=["á", *"bcdefghij"])
    assert made.outputs == ("logits", "restored")
    assert made.difference < 1e-4
    assert made.compared == 18
    proto = onnx.load(tmp_path / "a.onnx")
    onnx.checker.check_model(proto, full_check=True)
    facts = {prop.key: prop.value for prop in proto.metadata_props}
    assert facts["robustfpd"] == rf.__version__
    assert facts["weights_sha256"] == weights_sha256(model.classifier())
    assert json.loads(facts["class_names"]) == ["á", *"bcdefghij"]
    assert "[0, 1]" in facts["images"]
    values = [*proto.graph.input, *proto.graph.output]
    assert [value.name for value in values] == ["images", "logits", "restored"]
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in values] == ["batch"] * 3
    assert "[0, 1]" in proto.graph.input[0].doc_string
    assert proto.graph.output[0].doc_string.startswith("N×10")


def test_constrained_weights_become_plain_in_the_file_only(tmp_path: Path) -> None:
    model = tiny(head="spectral")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check(model, "torch", tmp_path / "file", (8, 8))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("denoise", DENOISE)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("protocol", ["improved", "corrected"])
def test_every_head_and_denoising(head: str, denoise: str, format: Format, protocol: str, tmp_path: Path) -> None:
    made = check(tiny(head=head, denoise=denoise, protocol=protocol), format, tmp_path / "file", (8, 8))
    assert made.difference < 1e-4


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=pytest.mark.slow), "torch"])
def test_networks_that_are_left_early(format: Format, tmp_path: Path) -> None:
    model = tiny(peeks=True, tail="pooling", head="orthogonal", image_size=(9, 13))
    assert model.backbone.leaves_early
    check(model, format, tmp_path / "file", (9, 13))


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=pytest.mark.slow), "torch"])
@pytest.mark.parametrize("front_stages", [1, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tail", ["own", "pooling"])
def test_networks_of_which_the_front_pass_runs_a_part(
    format: Format, front_stages: int | None, tail: str, tmp_path: Path
) -> None:
    model = tiny(front_stages=front_stages, tail=tail, image_size=(9, 13))
    made = check(model, format, tmp_path / "file", (9, 13))
    assert made.outputs == ("logits", "restored")
    assert made.difference < 1e-4


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=pytest.mark.slow), "torch"])
def test_odd_sizes_that_it_was_not_made_for(format: Format, tmp_path: Path) -> None:
    model = tiny(in_channels=3, image_size=(31, 45))
    made = check(model, format, tmp_path / "file", (17, 22), image_size=(17, 22))
    assert made.image_size == (17, 22)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_a_torchvision_network(format: Format, tmp_path: Path) -> None:
    import torchvision

    net = torchvision.models.resnet18(weights=None)
    stages = ["maxpool", "layer1", "layer2", "layer3", "layer4"]
    model = rf.enhance(net, stages=stages, num_classes=5, image_size=64).eval()
    assert check(model, format, tmp_path / "file", (64, 64)).outputs == ("logits", "restored")


def test_a_baseline(tmp_path: Path) -> None:
    plain = smallest()
    made = export(plain, tmp_path / "plain.pt2", format="torch")
    images = torch.rand(2, 1, 8, 8)
    (found,) = run_torch(made.path, images)
    with torch.no_grad():
        assert close(found, plain(images))
    with pytest.raises(InputError, match="has no restoration"):
        export(plain, tmp_path / "b.onnx", restored=True)


def test_a_torch_programs_metadata_and_weights_without_pickle(tmp_path: Path) -> None:
    export(smallest(), tmp_path / "a.pt2", format="torch", class_names=list("abcd"))
    extra = {"robustfpd.json": ""}
    torch.export.load(tmp_path / "a.pt2", extra_files=extra)
    assert json.loads(json.loads(extra["robustfpd.json"])["class_names"]) == list("abcd")
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive:
        weights = [name for name in archive.namelist() if "/weights/weight_" in name]
        assert weights
        assert not any(b"\x80\x02" in archive.read(name)[:2] or archive.read(name)[:2] == b"PK" for name in weights)


def test_nothing_is_written_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt2"
    path.write_text("what was there")
    runner = exporting._program_runner

    def worse(path: Path) -> Any:
        run = runner(path)
        return lambda images: [found + 2e-4 * (len(images) == 5) for found in run(images)]

    monkeypatch.setattr(exporting, "_program_runner", worse)
    with pytest.raises(InputError, match=r"differs from the network by 0.0002\d* for 5 images, 0.0001 is allowed"):
        export(smallest(), path, format="torch")
    assert path.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(
        exporting, "_program_runner", lambda path: lambda images: [torch.full((len(images), 4), torch.nan)]
    )
    with pytest.raises(InputError, match="differs from the network by nan"):
        export(smallest(), path, format="torch")


def test_the_file_is_compared_with_the_network_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    altered = exporting._plain_copy

    def wrong(model: FPD | Baseline) -> FPD | Baseline:
        found = altered(model)
        with torch.no_grad():
            for p in found.parameters():
                p.mul_(1.5)
        return found

    monkeypatch.setattr(exporting, "_plain_copy", wrong)
    with pytest.raises(InputError, match=r"differs from the network by .*; nothing was written"):
        export(smallest(), tmp_path / "new" / "folder" / "a.pt2", format="torch")
    assert not list(tmp_path.iterdir())


def test_concurrent_exports_to_one_file_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, runner, inner = tmp_path / "new" / "a.pt2", exporting._program_runner, list[Exported]()

    def during(partial: Path) -> Any:
        monkeypatch.setattr(exporting, "_program_runner", runner)
        inner.append(export(smallest(), path, format="torch"))
        return runner(partial)

    monkeypatch.setattr(exporting, "_program_runner", during)
    model = smallest(num_classes=5)
    export(model, path, format="torch")
    assert len(inner) == 1
    assert run_torch(path, torch.rand(2, 1, 8, 8))[0].shape == (2, 5)
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "a.pt2"]
    probe = tmp_path / "probe"
    probe.write_text("")
    assert path.stat().st_mode == probe.stat().st_mode  # others may read it as they may any new file
    with pytest.raises(InputError, match=r"probe is a file, so there can be no .*b.pt2; give a file in a folder"):
        export(smallest(), probe / "b.pt2", format="torch")


def test_what_cannot_be_exported_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="format must be onnx or torch, found 'tflite'"):
        export(smallest(), tmp_path / "a", format=cast(Format, "tflite"))
    with pytest.raises(InputError, match="is a folder"):
        export(smallest(), tmp_path)

    class Peeks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    model = smallest()
    model.backbone.net.append(Peeks())  # type: ignore[operator]
    with pytest.raises(InputError, match=r"cannot be exported: .*; its code must not decide by"):
        export(model, tmp_path / "a.pt2", format="torch")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(InputError, match=r"needs onnxruntime; install with: pip install 'robustfpd\[export\]'"):
        export(smallest(), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
