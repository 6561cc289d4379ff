from __future__ import annotations

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.errors import InputError
from robustfpd.models.backbones import BackboneSpec, from_timm
from robustfpd.models.insertion import StagedBackbone


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Pairs(nn.Module):
    """Passes (residual, dense) pairs between its stages, as dual-path networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Split()
        self.second = Join()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 2, 1)
        self.b = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


class Join(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([pair[0] + 1, pair[1] - 1], dim=1)


class ChannelsLast(nn.Module):
    """Passes N×H×W×C maps between its stages, as Swin does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x.permute(0, 2, 3, 1)))
        return out


def backbone(net: nn.Module, stages: tuple[str, ...], **options: Any) -> StagedBackbone:
    spec = BackboneSpec(net, stages, layout=options.pop("layout", "NCHW"))
    return StagedBackbone(spec, **{"in_channels": 3, "image_size": (16, 16), **options}).eval()


def weights_for(features: nn.Module, whole: nn.Module) -> dict[str, Tensor]:
    """Weights of a timm network under the names of its features_only form, which writes some dots as _."""
    known = {name.replace("_", "."): tensor for name, tensor in whole.state_dict().items()}
    return {name: known[name.replace("_", ".")] for name in features.state_dict()}


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0", "mobilenetv3_small_050"])
def test_features_are_those_of_timm(name: str) -> None:
    spec = from_timm(name, 3)
    reference: Any = timm.create_model(name, features_only=True).eval()
    reference.load_state_dict(weights_for(reference, spec.module))
    x = torch.rand(2, 3, 64, 64)
    ours = backbone(spec.module, spec.stages, image_size=(64, 64))
    with torch.no_grad():
        for found, expected in zip(ours(x), reference(x), strict=True):
            assert torch.allclose(found, expected, atol=1e-5)
    assert ours.channels == tuple(reference.feature_info.channels())
    assert ours.reductions == tuple(reference.feature_info.reduction())


def test_features_are_those_of_torchvision() -> None:
    import torchvision.models
    from torchvision.models.feature_extraction import create_feature_extractor

    net = torchvision.models.resnet18(weights=None).eval()
    stages = ("maxpool", "layer1", "layer2", "layer3", "layer4")
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = list(create_feature_extractor(net, list(stages))(x).values())
        found = backbone(copy.deepcopy(net), stages, image_size=(64, 64))(x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_next_stage_gets_what_the_inserted_layer_returns(chain: nn.Module, chain_stages: tuple[str, ...]) -> None:
    chain.eval()
    original: Any = copy.deepcopy(chain)
    calls: list[tuple[int, int]] = []

    def insert(index: int, channels: int) -> nn.Module | None:
        calls.append((index, channels))
        return Doubling() if index < 2 else None

    found = backbone(chain, chain_stages, insert=insert)(x := torch.rand(2, 3, 16, 16))
    stem = 2 * original.stem(x)
    first = 2 * original.first(stem)
    second = original.second(first)
    assert all(torch.allclose(a, b) for a, b in zip(found, (stem, first, second), strict=True))
    assert calls == [(0, 4), (1, 6), (2, 8)]


def test_raw_maps_are_those_before_the_inserted_layers(chain: nn.Module, chain_stages: tuple[str, ...]) -> None:
    double = backbone(chain, chain_stages, insert=lambda index, channels: Doubling() if index < 2 else None)
    x = torch.rand(2, 3, 16, 16)
    raw, inserted = double(x, raw=True), double(x)
    assert torch.equal(inserted[0], 2 * raw[0])
    assert torch.equal(inserted[1], 2 * raw[1])
    assert torch.equal(inserted[2], raw[2])  # what the last stage saw was doubled either way


def test_a_layer_inserted_in_a_timm_network_reaches_the_next_stage() -> None:
    spec = from_timm("resnet_mini", 3)
    original: Any = copy.deepcopy(spec.module).eval()
    double = backbone(spec.module, spec.stages, insert=lambda i, _: Doubling() if i == 1 else None)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        layer1 = 2 * original.layer1(original.maxpool(original.act1(original.bn1(original.conv1(x)))))
        expected = original.layer4(original.layer3(original.layer2(layer1)))
        assert torch.allclose(double(x)[-1], expected, atol=1e-5)
        assert torch.allclose(double(x)[1], layer1, atol=1e-5)


def test_pairs_of_maps_are_channels_of_one() -> None:
    net = Pairs()
    original: Any = copy.deepcopy(net)
    x = torch.rand(2, 3, 8, 8)
    first, second = backbone(net, ("first", "second"), insert=lambda i, _: Doubling() if i == 0 else None)(x)
    expected = 2 * torch.cat(original.first(x), dim=1)
    assert torch.allclose(first, expected)
    assert torch.allclose(second, torch.cat([expected[:, :2] + 1, expected[:, 2:] - 1], dim=1))


def test_nhwc_maps_are_permuted() -> None:
    net = ChannelsLast()
    original: Any = copy.deepcopy(net)
    x = torch.rand(2, 3, 8, 6)
    made = backbone(net, ("first", "second"), layout="NHWC", insert=lambda i, _: Doubling() if i == 0 else None)
    first, second = made(x)
    assert made.channels == (4, 6)
    expected = 2 * original.first(x.permute(0, 2, 3, 1))
    assert torch.allclose(first, expected.permute(0, 3, 1, 2))
    assert torch.allclose(second, original.second(expected).permute(0, 3, 1, 2), atol=1e-6)


def test_sizes_are_described(chain: nn.Module, chain_stages: tuple[str, ...]) -> None:
    made = backbone(chain, chain_stages)
    assert made.channels == (4, 6, 8)
    assert made.reductions == (2, 4, 4)
    assert made.multiple == 1
    assert [f.shape[1:] for f in made(torch.rand(1, 3, 20, 12))] == [(4, 10, 6), (6, 5, 3), (8, 5, 3)]


def test_an_unknown_stage_names_the_nearest(chain: nn.Module) -> None:
    with pytest.raises(InputError, match="unknown stage 'frst'; did you mean 'first'"):
        backbone(chain, ("stem", "frst"))


def test_no_stages_are_refused(chain: nn.Module) -> None:
    with pytest.raises(InputError, match="at least one"):
        backbone(chain, ())


def test_a_stage_named_twice_is_refused(chain: nn.Module) -> None:
    with pytest.raises(InputError, match="must differ"):
        backbone(chain, ("stem", "stem", "first"))


def test_stages_in_another_order_are_refused(chain: nn.Module) -> None:
    with pytest.raises(InputError, match=r"order they run.*\['stem', 'first', 'second'\]|do not run before"):
        backbone(chain, ("first", "stem", "second"))
    with pytest.raises(InputError, match=r"\['second'\] do not run before stage 'first' ends"):
        backbone(chain, ("stem", "second", "first"))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(3, 3, 1)
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.again(self.again(x)))
        return out


def test_a_stage_that_runs_twice_is_refused() -> None:
    with pytest.raises(InputError, match="run once each"):
        backbone(Twice(), ("again", "last"))


def test_a_stage_that_never_runs_is_refused(chain: nn.Module) -> None:
    chain.idle = nn.Conv2d(3, 3, 1)
    with pytest.raises(InputError, match="'idle'"):
        backbone(chain, ("stem", "idle", "first"))


class AddsInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


def test_a_stage_overwritten_by_the_next_layer_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), AddsInPlace(), nn.Conv2d(4, 4, 1))
    with pytest.raises(InputError, match="'0' is overwritten in place"):
        backbone(copy.deepcopy(net), ("0", "2"))
    assert backbone(copy.deepcopy(net), ("1", "2")).channels == (4, 4)
    assert backbone(net, ("1", "2"), front_stages=1).channels == (4, 4)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Hardswish])
def test_an_activation_after_a_stage_keeps_the_stages_map(activation: Any) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), activation(inplace=True), nn.Conv2d(4, 4, 1))
    convolution = copy.deepcopy(net[0])
    made, x = backbone(net, ("0", "2")), torch.rand(2, 3, 8, 8)
    assert torch.equal(made(x)[0], convolution(x))


def test_a_later_stage_than_the_front_passs_may_be_overwritten() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), AddsInPlace(), nn.Conv2d(4, 5, 1))
    expected, x = copy.deepcopy(net), torch.rand(2, 3, 8, 8)
    with pytest.raises(InputError, match="'1' is overwritten in place"):
        backbone(copy.deepcopy(net), ("0", "1", "3"))
    made = backbone(net, ("0", "1", "3"), front_stages=1, tail=True)
    assert made.channels == (4, 4, 5)
    assert [f.shape[1] for f in made(x)] == [4]
    assert torch.equal(made.classify(x), expected(x))


def test_with_its_tail_the_network_stays_whole(chain: Any, chain_stages: tuple[str, ...]) -> None:
    original, x = copy.deepcopy(chain).eval(), torch.rand(2, 3, 16, 16)
    made = backbone(chain, chain_stages, tail=True)
    assert isinstance(chain.head, nn.Linear)
    assert torch.equal(made.classify(x), original(x))
    assert [f.shape[1] for f in made(x)] == [4, 6, 8]
    doubled = backbone(copy.deepcopy(original), chain_stages, tail=True, insert=lambda *_: Doubling())
    maps = 2 * original.second(2 * original.first(2 * original.stem(x)))
    assert torch.allclose(doubled.classify(x), original.head(maps.mean(dim=(2, 3))), atol=1e-6)


@pytest.mark.parametrize(("front_stages", "channels"), [(1, [4]), (2, [4, 6]), (3, [4, 6, 8]), (9, [4, 6, 8])])
@pytest.mark.parametrize("tail", [False, True])
def test_the_forward_pass_leaves_after_the_front_stages(
    chain: Any, chain_stages: tuple[str, ...], front_stages: int, channels: list[int], tail: bool
) -> None:
    made = backbone(chain, chain_stages, front_stages=front_stages, tail=tail)
    ran: list[str] = []
    for name in (*chain_stages, "head") if tail else chain_stages:
        chain.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    assert [f.shape[1] for f in made(torch.rand(2, 3, 16, 16))] == channels
    assert made.channels == (4, 6, 8)
    assert ran == list(chain_stages[: len(channels)])
    assert [f.shape[1] for f in made(torch.rand(2, 3, 16, 16), whole=True)] == [4, 6, 8]


def test_a_stage_without_a_map_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 256, 2))
    with pytest.raises(InputError, match=r"stage '1' must return a map N×C×H×W, found shape \(1, 1024\)"):
        backbone(net, ("0", "1"))


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"map": x}


def test_a_stage_that_returns_something_else_is_refused() -> None:
    with pytest.raises(InputError, match="'1' must return a map N×C×H×W, found dict"):
        backbone(nn.Sequential(nn.Conv2d(3, 4, 1), Named()), ("0", "1"))


def test_images_the_network_cannot_take_are_refused(chain: nn.Module, chain_stages: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="does not take images of 1 channels and 16×16 pixels") as caught:
        backbone(chain, chain_stages, in_channels=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_users_network_does_not_change(chain: Any, chain_stages: tuple[str, ...], frozen: bool) -> None:
    chain.train()
    chain.stem[1].train(not frozen)
    before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    structure, flags = repr(chain), [m.training for m in chain.modules()]
    model = rf.enhance(chain, stages=chain_stages, num_classes=5, image_size=16)
    model(torch.rand(4, 3, 16, 16)).logits.sum().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert repr(chain) == structure
    assert [m.training for m in chain.modules()] == flags
    assert all(torch.equal(before[name], tensor) for name, tensor in chain.state_dict().items())
    assert all(p.grad is None for p in chain.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in chain.modules())
    assert chain(torch.rand(2, 3, 16, 16)).shape == (2, 5)


def test_building_changes_no_weights_and_no_flags(chain: Any, chain_stages: tuple[str, ...]) -> None:
    chain.stem[1].eval()
    before = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    made = StagedBackbone(BackboneSpec(chain, chain_stages), in_channels=3, image_size=(16, 16))
    assert all(torch.equal(before[name], tensor) for name, tensor in made.net.state_dict().items())
    assert not chain.stem[1].training
    assert chain.stem.training


def test_what_no_map_depends_on_is_pruned(chain: Any, chain_stages: tuple[str, ...]) -> None:
    made = backbone(chain, chain_stages)
    assert isinstance(chain.head, nn.Identity)
    sum((f.sum() for f in made(torch.rand(2, 3, 16, 16))), torch.zeros(())).backward()
    assert all(p.grad is not None for p in made.parameters())


class OwnParameter(nn.Module):
    """Uses a parameter and a module's weight without calling the module."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 3.0))
        self.store = nn.Conv2d(3, 3, 1)
        self.last = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.conv2d(x, self.store.weight, self.store.bias) * self.scale)
        return out


def test_weights_that_are_used_without_a_call_are_kept() -> None:
    net = OwnParameter()
    original = copy.deepcopy(net)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(backbone(net, ("last",))(x)[0], original(x))


@pytest.mark.parametrize("defence", ["fpd", "none"])
def test_a_copy_is_equal_and_independent(defence: Any) -> None:
    task = rf.TaskConfig(num_classes=3, in_channels=1, image_size=(16, 16))
    model = rf.build(task, rf.ModelConfig(defence=defence, denoise="bottleneck")).eval()
    x = torch.rand(2, 1, 16, 16)
    with torch.no_grad():
        before = model.classifier()(x)
        copied = copy.deepcopy(model)
        assert torch.equal(copied.classifier()(x), before)
        for parameter in copied.parameters():
            parameter.zero_()
        assert torch.equal(model.classifier()(x), before)
        assert not torch.equal(copied.classifier()(x), before)
        if defence == "fpd":
            other = copy.deepcopy(model)
            for parameter in other.backbone.inserted.parameters():
                parameter.add_(1)
            assert not torch.equal(other.classifier()(x), before)


@pytest.mark.parametrize("name", ["resnet18", "resnet_mini", "convnext_atto", "efficientnet_b0", "regnetx_002"])
def test_a_small_stem_keeps_all_weights_and_gives_maps_of_full_size(name: str) -> None:
    usual, small = (from_timm(name, 3) for _ in range(2))
    made = backbone(usual.module, usual.stages, image_size=(32, 32))
    full = backbone(small.module, small.stages, image_size=(32, 32), small_stem=True)
    assert {k: v.shape for k, v in made.state_dict().items()} == {k: v.shape for k, v in full.state_dict().items()}
    with torch.no_grad():
        sizes = [f.shape[-1] for f in full(torch.rand(1, 3, 32, 32))]
    assert sizes[-4:] == [32, 16, 8, 4]
    assert full.reductions[-4:] == (1, 2, 4, 8)
    assert made.reductions[-1] == 32


def test_a_small_stem_can_remove_the_pooling_alone() -> None:
    maps = {}
    for small_stem in (False, "pool", True):
        spec = from_timm("resnet_mini", 3)
        maps[small_stem] = backbone(spec.module, spec.stages, image_size=(32, 32), small_stem=small_stem)
    x = torch.rand(1, 3, 32, 32)
    assert [made(x)[1].shape[-1] for made in maps.values()] == [8, 16, 32]  # after the first stage of blocks
    assert maps["pool"].net.get_submodule("conv1.0").stride == (2, 2)


def test_a_small_stem_keeps_the_images_odd_size() -> None:
    spec = from_timm("resnet_mini", 1)
    made = backbone(spec.module, spec.stages, in_channels=1, image_size=(27, 33), small_stem=True)
    with torch.no_grad():
        assert [tuple(f.shape[-2:]) for f in made(torch.rand(1, 1, 27, 33))][:3] == [(27, 33), (27, 33), (14, 17)]


def test_families_that_need_even_sizes_see_padded_images() -> None:
    spec = from_timm("dla34", 1)
    made = backbone(spec.module, spec.stages, in_channels=1, image_size=(27, 33))
    assert made.multiple > 1
    height, width = made.padded((27, 33))
    assert height % made.multiple == width % made.multiple == 0
    assert 27 <= height < 27 + made.multiple
    assert 33 <= width < 33 + made.multiple
    x = torch.rand(1, 1, 27, 33)
    edges = torch.nn.functional.pad(x, (0, width - 33, 0, height - 27), mode="replicate")
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(made(x), made(edges), strict=True))


def test_a_pass_that_fails_leaves_nothing_behind(chain: nn.Module, chain_stages: tuple[str, ...]) -> None:
    made = backbone(chain, chain_stages)
    x = torch.rand(1, 3, 16, 16)
    before = made(x)
    with pytest.raises(RuntimeError):
        made(torch.rand(1, 2, 16, 16))
    assert all(torch.equal(a, b) for a, b in zip(made(x), before, strict=True))


def test_a_model_does_not_hold_on_to_feature_maps(chain: nn.Module, chain_stages: tuple[str, ...]) -> None:
    made = backbone(chain, chain_stages)
    maps = [weakref.ref(feature) for feature in made(torch.rand(1, 3, 16, 16))]
    gc.collect()
    assert [ref() for ref in maps] == [None] * 3


class SharedPool(nn.Module):
    """One pool that stands after every stage, as small networks often have it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.blocks = nn.ModuleList(nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1) for i in range(5))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.pool(block(x))
        return x


def test_a_small_stem_keeps_a_pool_that_later_stages_need() -> None:
    stages = tuple(f"blocks.{i}" for i in range(5))
    built = StagedBackbone(BackboneSpec(SharedPool(), stages), in_channels=3, image_size=(32, 32), small_stem=True)
    assert built.reductions == (1, 2, 4, 8, 16)


def test_threads_do_not_get_each_others_maps(chain: nn.Module, chain_stages: tuple[str, ...]) -> None:
    built = backbone(chain, chain_stages).eval()
    images = [torch.rand(2, 3, 16 + 4 * i, 16 + 4 * i) for i in range(4)]

    def shapes(x: Tensor) -> list[tuple[int, ...]]:
        with torch.no_grad():
            return [tuple(f.shape) for f in built(x)]

    expected = [shapes(x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        assert all(found == expected[i % 4] for i, found in enumerate(pool.map(shapes, images * 60)))


def test_a_size_the_network_was_not_built_for_is_named() -> None:
    model = rf.enhance("dla34", num_classes=3, image_size=64, pyramid_channels=8).eval()
    with pytest.raises(InputError, match=r"built for images of 64×64 pixels and does not take 75×83: .*image_size"):
        model(torch.rand(1, 3, 75, 83))


def test_the_whole_network_compiles_without_a_break() -> None:
    model = rf.enhance("resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8).eval()
    images = torch.rand(2, 1, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(images).logits, model(images).logits, atol=1e-6)


class Functional(nn.Module):
    """Reads settings and weights of modules that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.mid = nn.Conv2d(4, 6, 3, padding=1)
        self.end = nn.Conv2d(6, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.training:
            x = nn.functional.dropout(x, self.drop.p)
        out: Tensor = self.end(nn.functional.conv2d(x, self.mid.weight, padding=1))
        return out


@pytest.mark.parametrize("frozen", [False, True])
def test_modules_that_are_read_but_never_called_are_kept(frozen: bool) -> None:
    net = Functional()
    net.mid.requires_grad_(not frozen)
    model = rf.enhance(net, stages=["stem", "end"], num_classes=3, image_size=16, activation="keep")
    assert model.train()(torch.rand(2, 3, 16, 16)).logits.shape == (2, 3)
    assert [p.requires_grad for n, p in model.named_parameters() if "mid.weight" in n] == [not frozen]
