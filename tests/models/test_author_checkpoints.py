from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.errors import InputError
from robustfpd.models import author_checkpoints
from robustfpd.models.author_checkpoints import read_author_checkpoint
from robustfpd.models.backbones import from_timm
from robustfpd.models.factory import assemble

Outputs = dict[str, Tensor]


def denoised(x: Tensor) -> Tensor:
    """X + (X Xᵀ) X / P, as the formula stands."""
    flat = x.flatten(2)
    gram = torch.einsum("ncp,ndp->ncd", flat, flat)
    return x + (torch.einsum("ncd,ndp->ncp", gram, flat) / flat.shape[2]).reshape(x.shape)


class Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, stride: int, act: nn.Module) -> None:
        super().__init__()
        after = 4 * width
        self.group1 = nn.ModuleDict(
            {
                "conv1": nn.Conv2d(before, width, 1, bias=False), "bn1": nn.BatchNorm2d(width),
                "conv2": nn.Conv2d(width, width, 3, stride, 1, bias=False), "bn2": nn.BatchNorm2d(width),
                "conv3": nn.Conv2d(width, after, 1, bias=False), "bn3": nn.BatchNorm2d(after),
            }
        )  # fmt: skip
        if before != after or stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in "123":
            y = self.group1[f"bn{i}"](self.group1[f"conv{i}"](y))
            y = self.act(y) if i != "3" else y
        out: Tensor = self.act(y + (self.downsample(x) if hasattr(self, "downsample") else x))
        return out


class Aggregated(nn.Module):
    def __init__(self, before: int, width: int, stride: int, act: nn.Module) -> None:
        super().__init__()
        inner, after = 2 * width, 4 * width
        self.split_transforms = nn.Sequential(
            nn.Conv2d(before, inner, 1, groups=32, bias=False), nn.BatchNorm2d(inner), act,
            nn.Conv2d(inner, inner, 3, stride, 1, groups=32, bias=False), nn.BatchNorm2d(inner), act,
            nn.Conv2d(inner, after, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        if before != after or stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.split_transforms(x) + (self.shortcut(x) if hasattr(self, "shortcut") else x))
        return out


class Reference(nn.Module):
    """The published networks written down from their description, under the authors' names."""

    def __init__(
        self, blocks: Sequence[int], classes: int, width: int, *, next_: bool = False, plain: bool = False,
        in_channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.plain = plain
        act: nn.Module = nn.ReLU() if plain else nn.ELU()
        block: Callable[..., nn.Module] = Aggregated if next_ else Bottleneck
        fc = nn.Linear(2048, classes)
        if next_:
            self.conv1 = nn.Sequential(nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), act)
            self.fc = fc
            names, strides = ("conv2", "conv3", "conv4", "conv5"), (1, 2, 2, 2)
        else:
            self.group1 = nn.Sequential()
            self.group1.add_module("conv1", nn.Conv2d(in_channels, 64, 7, 2, 3, bias=False))
            self.group1.add_module("bn1", nn.BatchNorm2d(64))
            self.group1.add_module("act", act)
            self.group1.add_module("pool", nn.MaxPool2d(3, 2, 1))
            self.group2 = nn.Sequential()
            self.group2.add_module("fc", fc)
            names, strides = ("layer1", "layer2", "layer3", "layer4"), (1, 2, 2, 2)
        before = 64
        for name, stride, wide, count in zip(names, strides, (64, 128, 256, 512), blocks, strict=True):
            layers = [block(before, wide, stride, act)] + [block(4 * wide, wide, 1, act) for _ in range(count - 1)]
            self.add_module(name, nn.Sequential(*layers))
            before = 4 * wide
        self.names = ("conv1" if next_ else "group1", *names)
        self.toplayer = nn.Conv2d(2048, width, 1)
        if not plain:
            self.latlayer1, self.latlayer2 = nn.Conv2d(1024, width, 1), nn.Conv2d(512, width, 1)
            self.latlayer3, self.smooth3 = nn.Conv2d(256, width, 1), nn.Conv2d(width, width, 3, padding=1)
            ups = ((1, 1), (1, 0)) if next_ else ((2, 0), (2, 0))  # stride and padding
            self.trans_conv = nn.Sequential(
                nn.ConvTranspose2d(width, 64, 2, *ups[0]), nn.ConvTranspose2d(64, 16, 2, *ups[1]),
                nn.ConvTranspose2d(16, in_channels, 1),
            )  # fmt: skip

    @property
    def classifier(self) -> nn.Linear:
        """The last layer."""
        found = self.get_submodule("fc" if "fc" in self._modules else "group2.fc")
        assert isinstance(found, nn.Linear)
        return found

    def maps(self, x: Tensor) -> list[Tensor]:
        """The five stages' maps, before denoising."""
        found = []
        for i, name in enumerate(self.names):
            found.append(self.get_submodule(name)(x))
            x = denoised(found[-1]) if i < 2 and not self.plain else found[-1]
        return found

    def forward(self, x: Tensor) -> Outputs:
        fc = self.classifier
        front = self.maps(x)
        if self.plain:
            return {"logits": fc(front[-1].mean((2, 3)))}
        p = self.toplayer(front[4])
        for lateral, c in ((self.latlayer1, front[3]), (self.latlayer2, front[2]), (self.latlayer3, front[1])):
            p = F.interpolate(p, c.shape[2:], mode="bilinear", align_corners=False) + lateral(c)
        restored = self.trans_conv(self.smooth3(p))
        back = self.maps(restored + denoised(x) - x)
        return {"logits": torch.tanh(fc(back[-1].mean((2, 3)))), "restored": restored}


def reference(*args: Any, **options: Any) -> Reference:
    """A reference with weights and running statistics as a training might leave them."""
    net = Reference(*args, **options).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.weight, 0.2, 0.6)  # more, and denoising, cubic and twice a pass, overflows
            nn.init.uniform_(module.bias, -0.1, 0.1)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.3, 1)
    with torch.no_grad():
        net.classifier.weight.mul_(3)  # logits that differ
    return net


def checkpoint(path: Path, state: dict[str, Any], **options: Any) -> Path:
    optimiser = torch.optim.Adam([nn.Parameter(torch.zeros(2))]).state_dict()
    torch.save({"state_dict": state, "opt_state_dict": optimiser, "opt_state_dict2": optimiser, "epoch": 4}, path,
               **options)  # fmt: skip
    return path


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value expected."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def assert_agree(model: rf.FPD | rf.Baseline, net: Reference, images: Tensor) -> None:
    with torch.no_grad():
        expected, found = net(images), model(images)
    if isinstance(model, rf.Baseline):
        assert apart(found, expected["logits"]) < 1e-4
        return
    assert float(expected["logits"].std()) > 0.01
    assert float(expected["logits"].abs().max()) < 0.99  # a saturated tanh would hide differences
    assert apart(found.restored, expected["restored"]) < 1e-4
    assert apart(found.logits, expected["logits"]) < 1e-4


@pytest.mark.parametrize(
    ("next_", "blocks", "classes", "width", "size", "architecture"),
    [
        (False, (1, 1, 1, 1), 10, 256, 64, "ResNet-14"),
        (False, (2, 1, 3, 1), 102, 128, 64, "ResNet-23"),
        pytest.param(False, (3, 4, 6, 3), 257, 64, 64, "ResNet-50", marks=pytest.mark.slow),
        (False, (1, 1, 1, 1), 102, 128, 224, "ResNet-14"),
        (True, (1, 1, 1, 1), 10, 128, 64, "ResNeXt-14 32×4d"),
        (True, (1, 2, 1, 3), 257, 256, 24, "ResNeXt-23 32×4d"),
    ],
)
def test_a_network_agrees_with_its_description(
    tmp_path: Path, next_: bool, blocks: tuple[int, ...], classes: int, width: int, size: int, architecture: str
) -> None:
    net = reference(blocks, classes, width, next_=next_)
    found = read_author_checkpoint(checkpoint(tmp_path / "a.pkl", net.state_dict()))
    assert isinstance(found.model, rf.FPD)
    assert (found.architecture, found.blocks, found.epoch) == (architecture, blocks, 4)
    assert found.model.config.pyramid_channels == width
    assert found.model.task == rf.TaskConfig(num_classes=classes, image_size=(64, 64) if classes == 10 else (224, 224))
    assert not any(m.training for m in found.model.modules())
    assert all(p.requires_grad and p.dtype == torch.float32 for p in found.model.parameters())
    assert_agree(found.model, net, torch.rand(2, 3, size, size))


def test_mean_and_std_put_the_loaders_normalisation_into_the_model(tmp_path: Path) -> None:
    net = reference((1, 1, 1, 1), 102, 64)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = rf.load_published(checkpoint(tmp_path / "a.pkl", net.state_dict()), mean=mean, std=std)
    assert isinstance(model, rf.FPD)
    images = torch.rand(2, 3, 64, 64)
    m, s = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (mean, std))
    with torch.no_grad():
        expected, found = net((images - m) / s), model(images)
    assert apart(found.logits, expected["logits"]) < 1e-4
    assert apart(found.restored, expected["restored"] * s + m) < 1e-4
    model.save(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(rf.load(tmp_path / "saved").classifier()(images), model.classifier()(images))


@pytest.mark.parametrize("next_", [False, True])
def test_a_surrogate_is_a_plain_network(tmp_path: Path, next_: bool) -> None:
    net = reference((1, 2, 1, 1), 10, 256, next_=next_, plain=True)
    model = rf.load_published(checkpoint(tmp_path / "a.pkl", net.state_dict()))
    assert isinstance(model, rf.Baseline)
    images = torch.rand(2, 3, 32, 32)
    assert_agree(model, net, images)
    model.save(tmp_path / "model")
    assert torch.equal(rf.load(tmp_path / "model")(images), model(images))
    without = {key: tensor for key, tensor in net.state_dict().items() if not key.startswith("toplayer")}
    assert torch.equal(rf.load_published(checkpoint(tmp_path / "b.pkl", without))(images), model(images))


@pytest.mark.parametrize("next_", [False, True])
def test_a_converted_fpd_is_saved_trained_and_attacked_like_any_other(tmp_path: Path, next_: bool) -> None:
    path = checkpoint(tmp_path / "a.pkl", reference((1, 1, 1, 1), 3, 64, next_=next_).state_dict())
    model = rf.load_published(path, image_size=(20, 33))
    assert isinstance(model, rf.FPD)
    assert model.task.image_size == (20, 33)
    images = torch.rand(2, 3, 20, 33)
    model.save(tmp_path / "model")
    loaded = rf.load(tmp_path / "model")
    assert isinstance(loaded, rf.FPD)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    out = loaded(images)
    assert torch.equal(out.logits, model.classifier()(images))
    assert out.restored.shape == images.shape
    x_adv = rf.attacks.pgd(model.classifier(), images, out.logits.argmax(1), eps=0.1, norm="linf", steps=1)
    assert 0 < float((x_adv - images).abs().max()) <= 0.1 + 1e-6
    model.train()(images).logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def spread(**options: Any) -> dict[str, Any]:
    """A state_dict of the right shapes and of one number, a tensor each: a file of some kilobytes."""
    with torch.device("meta"):
        state = Reference((1, 1, 1, 1), 3, 64, **options).state_dict()
    return {key: torch.ones((), dtype=t.dtype).expand(t.shape) for key, t in state.items()}


@functools.cache
def empty(task: rf.TaskConfig, config: rf.ModelConfig) -> rf.FPD | rf.Baseline:
    return assemble(task, config)


@pytest.fixture
def built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks without weights come out of a cache: most of the time goes there."""
    monkeypatch.setattr(author_checkpoints, "assemble", lambda task, config: copy.deepcopy(empty(task, config)))


@pytest.mark.usefixtures("built_once")
@pytest.mark.parametrize(
    "kept",
    [
        lambda state: {f"module.{key}": t for key, t in state.items()},
        lambda state: {f"module.module.{key}": t for key, t in state.items()},
        lambda state: {key: t.half() if t.is_floating_point() else t for key, t in state.items()},
        lambda state: {key: t.double() if t.is_floating_point() else t for key, t in state.items()},
        lambda state: {key: nn.Parameter(t) if t.is_floating_point() else t for key, t in state.items()},
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_the_forms_in_which_weights_are_saved(
    tmp_path: Path, kept: Callable[[dict[str, Tensor]], dict[str, Tensor]], legacy: bool
) -> None:
    state = spread()
    state["group1.conv1.weight"] = torch.randn(64, 3, 7, 7).half().float()
    path = checkpoint(tmp_path / "a.pkl", kept(state), _use_new_zipfile_serialization=not legacy)
    loaded = rf.load_published(path).state_dict()
    assert torch.equal(loaded["backbone.net.conv1.weight"], state["group1.conv1.weight"])
    assert torch.equal(loaded["backbone.net.layer4.0.bn3.running_var"], torch.ones(2048))
    assert {t.dtype for t in loaded.values()} == {torch.float32, torch.int64}
    loaded["backbone.net.bn1.bias"] += 1  # fails where the elements still share the file's one number


def test_a_bare_state_dict_without_counters_and_with_grey_images(tmp_path: Path) -> None:
    state = {key: t for key, t in spread(in_channels=1).items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "a.pkl")
    found = read_author_checkpoint(tmp_path / "a.pkl", image_size=40)
    assert found.epoch is None
    assert found.model.task == rf.TaskConfig(num_classes=3, in_channels=1, image_size=(40, 40))


def without(*prefixes: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {key: t for key, t in state.items() if not key.startswith(prefixes)}


def also(key: Any, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, key: value}


@pytest.mark.usefixtures("built_once")
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without("group2.fc.bias"), r"a ResNet-14 with .* which lacks group2\.fc\.bias; give"),
        (without("layer3.0.group1.bn"), r"lacks layer3\.0\.group1\.bn1\.bias, .*bn1\.running_mean and 10 more"),
        (without("group2"), r"lacks group2\.fc\.weight"),
        (without("group1"), r"lacks group1\.conv1\.weight"),
        (without("toplayer"), r"lacks toplayer\.weight"),
        (without("trans_conv"), r"lacks trans_conv\.0\.bias, trans_conv\.0\.weight and 4 more"),
        (without("layer3"), r"lacks layer3\.0: found none of its blocks"),
        (without("layer", "module"), r"no published network: .* found group1\.conv1\.weight, group1\.bn1\.weight"),
        (lambda state: {}, "no published network: .* found nothing"),
        (also("layer2.2.group1.conv1.weight", torch.ones(1)), r"lacks layer2\.1: found blocks \[0, 2\]"),
        (also("layer2.1.group1.conv1.weight", torch.ones(128, 512, 1, 1)), r"a ResNet-17 .* lacks layer2\.1\.group1"),
        (also("layer2.9999999.group1.conv1.weight", torch.ones(1)), r"has no place for layer2\.9999999\.group1"),
        (also("latlayer4.weight", torch.ones(1)), r"has no place for latlayer4\.weight; give"),
        (also("x\n" + 99 * "y", torch.ones(1)), r"has no place for x\\ny{54}\.\.\.; give"),
        (also("latlayer3.weight", torch.ones(64, 64, 1, 1)), r"\(64, 64, 1, 1\), expected \(64, 256, 1, 1\)"),
        (also("layer1.0.group1.conv1.weight", torch.ones(64, 64, 3, 3)), r"conv1\.weight .* expected \(64, 64, 1, 1\)"),
        (also("trans_conv.1.weight", torch.ones(64, 16, 3, 3)), r"trans_conv\.1\.weight .*\(64, 16, 2, 2\)"),
        (also("group2.fc.weight", torch.ones(3)), r"group2\.fc\.weight .* has shape \(3,\), expected K×C"),
        (also("group2.fc.weight", torch.ones(1, 2048)), r"num_classes: .* found 1"),
        (also("group2.fc.weight", torch.ones(4, 2048)), r"group2\.fc\.bias .* shape \(3,\), expected \(4,\)"),
        (
            also("toplayer.weight", torch.ones(0, 2048, 1, 1)),
            "toplayer.weight in .* has 0 channels, expected 64 or more",
        ),
        (
            also("toplayer.weight", torch.ones(()).expand(2**31, 2048, 1, 1)),
            "describes a network that cannot be built: Storage size",
        ),
        (also("smooth3.bias", 8 * [1.0]), r"smooth3\.bias in .* must be a tensor, found list"),
        (also(3, torch.ones(1)), "must name its tensors by strings, found 3"),
        (also("smooth3.bias", torch.full((64,), torch.nan)), r"smooth3\.bias in .* holds NaN"),
        (also("smooth3.bias", torch.full((64,), 1e300, dtype=torch.float64)), r"smooth3\.bias in .* infinite"),
        (also("smooth3.bias", torch.ones(64, dtype=torch.int32)), r"smooth3\.bias in .* found int32"),
        (also("smooth3.bias", torch.ones(64, dtype=torch.complex64)), r"smooth3\.bias in .* found complex64"),
        (also("smooth3.bias", torch.ones(64).to_sparse()), r"smooth3\.bias in .* found float32 on cpu, torch\.sparse"),
        (also("smooth3.bias", torch.ones(64, device="meta")), r"smooth3\.bias in .* found float32 on meta"),
        (also("group1.bn1.running_var", torch.full((64,), -1.0)), "running_var in .* variances .* found -1"),
        (lambda state: [1], "state_dict in .* must be a dict of tensors, found list"),
    ],
)
def test_unfit_tensors_are_named(tmp_path: Path, damage: Callable[[dict[str, Any]], Any], expected: str) -> None:
    path = checkpoint(tmp_path / "a.pkl", damage(spread()))
    with pytest.raises(InputError, match=expected) as error:
        rf.load_published(path)
    assert len(str(error.value).splitlines()) == 1
    assert str(path) in str(error.value)


def test_resnexts_of_another_kind_are_refused(tmp_path: Path) -> None:
    state = {**spread(next_=True), "conv2.0.split_transforms.0.weight": torch.ones(128, 64, 1, 1)}
    with pytest.raises(
        InputError, match=r"split_transforms\.0\.weight .* \(128, 64, 1, 1\), expected \(128, 2, 1, 1\)"
    ):
        rf.load_published(checkpoint(tmp_path / "a.pkl", state))


def test_basic_blocks_are_refused(tmp_path: Path) -> None:
    state = {key: t for key, t in spread().items() if ".0.group1.conv3" not in key}
    with pytest.raises(InputError, match=r"has basic blocks \(layer1\.0\.group1\.conv3\.weight is missing\)"):
        rf.load_published(checkpoint(tmp_path / "a.pkl", state))


@pytest.mark.parametrize(("size", "expected"), [(7, "at least 8 pixels"), (0, "image_size.0: .* greater than 0"),
                                                ((64, 7), "at least 8"), ("64", "image_size")])  # fmt: skip
def test_unsupported_image_sizes_are_refused(tmp_path: Path, size: Any, expected: str) -> None:
    path = checkpoint(tmp_path / "a.pkl", spread())
    with pytest.raises(InputError, match=expected):
        rf.load_published(path, image_size=size)


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"layer1.0\n", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", pickle.dumps({"state_dict": {}}),
        saved({"state_dict": spread()})[:-300], saved({"state_dict": spread()})[:900],
        saved({"state_dict": spread()}, _use_new_zipfile_serialization=False)[:-300],
    ],
)  # fmt: skip
def test_files_that_torch_did_not_write_or_that_end_early(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.pkl is damaged or was not written by torch\.save"):
        rf.load_published(tmp_path / "a.pkl")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no file .*nowhere\.pkl \(looked in"):
        rf.load_published(tmp_path / "nowhere.pkl")
    with pytest.raises(InputError, match="is not a file; give the checkpoint itself"):
        rf.load_published(str(tmp_path))
    (tmp_path / "a.pkl").write_bytes(saved([1, 2]))
    with pytest.raises(InputError, match="must hold a dict with a state_dict, found list"):
        rf.load_published(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_bytes(saved({"epoch": 3}))
    with pytest.raises(InputError, match=r"epoch in .* must be a tensor, found int"):
        rf.load_published(tmp_path / "a.pkl")


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> Any:
        return open, (str(self.victim), "w")


@pytest.mark.parametrize("where", ["state_dict", "opt_state_dict"])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_not_run(tmp_path: Path, where: str, legacy: bool) -> None:
    victim = tmp_path / "victim"
    content = {"state_dict": spread(), where: Malicious(victim)}
    (tmp_path / "a.pkl").write_bytes(saved(content, _use_new_zipfile_serialization=not legacy))
    with pytest.raises(InputError, match=r"refers to code \(\w*\.open\), which weights do not need") as error:
        rf.load_published(tmp_path / "a.pkl")
    assert "weights_only" not in str(error.value)
    assert not victim.exists()
    torch.load(tmp_path / "a.pkl", weights_only=False)
    assert victim.exists()  # so the file was dangerous


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pkl")
    with pytest.raises(InputError, match=r"refers to code \(torch\.nn\.modules\.linear\.Linear\)"):
        rf.load_published(tmp_path / "a.pkl")


def test_the_published_resnet_is_timms() -> None:
    own, theirs = from_timm("published_resnet_3_4_6_3", 3).module, timm.create_model("resnet50", num_classes=0)
    assert {k: t.shape for k, t in own.state_dict().items()} == {k: t.shape for k, t in theirs.state_dict().items()}
    own.load_state_dict(theirs.state_dict())
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(own.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("name", ["published_resnet_1_1_1_1", "published_resnext_1_1_1_1"])
def test_published_backbones_can_be_wrapped_and_have_no_pretrained_weights(name: str) -> None:
    model = rf.enhance(name, num_classes=3, in_channels=1, image_size=16, pyramid_channels=4)
    assert model(torch.rand(2, 1, 16, 16)).restored.shape == (2, 1, 16, 16)
    with pytest.raises(InputError, match=f"backbone '{name}' has no pretrained weights"):
        rf.enhance(name, num_classes=3, image_size=16, pretrained=True)


@pytest.mark.parametrize("blocks", ["3_4_6", "0_1_1_1", "1_1_1_1_1", "1_1_1_01", "1_1_1_١", ""])
def test_malformed_names_are_unknown(blocks: str) -> None:
    with pytest.raises(InputError, match=r"unknown backbone .*did you mean 'published_resn"):
        rf.enhance(f"published_resnet_{blocks}", num_classes=3, image_size=16)


def test_the_authors_own_numbers(published_folder: Path) -> None:
    expected = load_file(published_folder / "expected.safetensors")
    model = rf.load_published(published_folder / "bestmodel_params.pkl")
    assert isinstance(model, rf.FPD)
    maps: list[Tensor] = []
    for name in model.backbone.stage_names:
        stage = model.backbone.net.get_submodule(name)
        stage.register_forward_hook(lambda module, args, output: maps.append(output), prepend=True)
    with torch.no_grad():
        out = model(expected["input"])
    assert apart(out.restored, expected["restored"]) < 1e-4
    assert apart(out.logits, expected["logits"]) < 1e-4
    stages = sorted(
        (k.removeprefix("front.") for k in expected if k.startswith("front.")), key=lambda k: (k != "group1", k)
    )
    for found, name in zip(maps, [f"{p}.{s}" for p in ("front", "back") for s in stages], strict=True):
        assert apart(found[:1, :8], expected[name]) < 1e-4
