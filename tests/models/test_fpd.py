from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from tests.fpds import as_trained, corrected
from tests.models.conftest import MINI, mini
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.errors import InputError
from robustfpd.models.denoise import dot_product, normalised
from robustfpd.models.small_networks import resnet_mini

PROTOCOLS = pytest.mark.parametrize("protocol", ["improved", "corrected"])


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("middle", ["input", "restored", "none"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_is_front_restoration_middle_back_and_head(middle: Any, mode: str) -> None:
    model = mini(protocol="corrected", middle=middle, mean=(0.2,), std=(0.5,)).train(mode == "train")
    x = torch.rand(3, 1, 16, 16)
    out = model(x)
    front = model.backbone((x - 0.2) / 0.5)
    restored = model.decoder(front[-4:], (16, 16))
    added = {"input": dot_product(x), "restored": dot_product(restored), "none": torch.zeros_like(x)}[middle]
    back = model.backbone((restored + added - 0.2) / 0.5)
    linear = model.head.linear
    assert isinstance(linear, nn.Linear)
    logits = F.linear(back[-1].mean(dim=(2, 3)), linear.weight, linear.bias).tanh()
    assert torch.allclose(out.restored, restored, atol=1e-6)
    assert torch.allclose(out.logits, logits, atol=1e-6)


@pytest.mark.parametrize("middle", ["input", "restored", "none"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("noise", [None, 0.2])
def test_improved_adds_restoration_and_gated_means_and_ends_with_the_networks_own_layers(
    middle: Any, mode: str, noise: float | None
) -> None:
    model = mini(middle=middle, mean=(0.2,), std=(0.5,)).train(mode == "train")
    x = torch.rand(3, 1, 16, 16)
    between = None if noise is None else noise * torch.rand_like(x)
    out = model(x, between)
    front = model.backbone((x - 0.2) / 0.5)
    restored = x + 0.1 * model.decoder(front, (16, 16))
    added = {"input": normalised(x), "restored": normalised(restored), "none": torch.zeros_like(x)}[middle]
    seen = restored + 0.3 * added + (0 if between is None else between)
    features = model.backbone.classify((seen - 0.2) / 0.5)
    linear = model.head.linear
    assert isinstance(linear, nn.Linear)
    assert len(front) == 2
    assert features.shape == (3, 128)
    assert torch.allclose(out.restored, restored, atol=1e-6)
    assert torch.allclose(out.logits, F.linear(features, linear.weight, linear.bias), atol=1e-6)
    assert float((restored - x).detach().abs().max()) > 0.01


@pytest.mark.parametrize(
    ("protocol", "kinds"),
    [("corrected", ("dot", "softmax", "gaussian")), ("improved", ("normalised", "dot", "softmax", "gaussian"))],
)
def test_the_middle_uses_the_denoising_layers_affinity(protocol: str, kinds: tuple[str, ...]) -> None:
    x = torch.rand(2, 1, 16, 16)
    outs = [mini(protocol=protocol, denoise=kind, denoise_after=()).eval()(x).logits for kind in kinds]
    for i, first in enumerate(outs):
        assert all(not torch.allclose(first, other) for other in outs[:i])
    assert torch.equal(outs[0], mini(protocol=protocol, denoise="none", denoise_after=()).eval()(x).logits)


@pytest.mark.parametrize("front_stages", [None, 1, 2, 4, 5])
def test_the_front_pass_runs_the_first_stages_and_the_back_pass_the_whole_network(front_stages: int | None) -> None:
    model = mini(front_stages=front_stages)
    calls: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda *_: calls.update({name: calls.get(name, 0) + 1})

    layers = [n for n, m in model.backbone.net.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]
    for name in layers:
        model.backbone.net.get_submodule(name).register_forward_hook(count(name))
    model(torch.rand(2, 1, 16, 16))
    ends = ["bn1", "layer1", "layer2", "layer3", "layer4"][: front_stages or 5]
    twice = ("conv1", *ends)
    assert calls == {name: 2 if name.startswith(twice) else 1 for name in layers}
    assert len(model.decoder.laterals) == min(4, len(ends))
    assert set(calls.values()) == ({2} if len(ends) == 5 else {1, 2})
    calls.clear()
    pooling = mini(front_stages=front_stages, tail="pooling")
    for name in layers:
        pooling.backbone.net.get_submodule(name).register_forward_hook(count(name))
    pooling(torch.rand(2, 1, 16, 16))
    assert calls == {name: 2 if name.startswith(twice) else 1 for name in layers}


def test_inner_denoising_follows_the_chosen_stages() -> None:
    assert set(mini().backbone.inserted) == {"0", "1"}
    assert set(mini(denoise_after=(1, 3)).backbone.inserted) == {"1", "3"}
    assert not mini(denoise="none").backbone.inserted
    with pytest.raises(InputError, match=r"denoise_after counts the 5 stages \(.*layer4\) from 0, found 5"):
        mini(denoise_after=(0, 5))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, (27, 33), 28, 64])
def test_the_restored_image_is_shaped_like_the_image(channels: int, size: Any) -> None:
    model = mini(in_channels=channels, image_size=size)
    shape = (2, channels, *((size, size) if isinstance(size, int) else size))
    out = model(torch.rand(shape))
    assert out.restored.shape == shape
    assert out.logits.shape == (2, 4)


def test_a_large_image() -> None:
    model = mini(in_channels=3, image_size=256).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 256, 256)).restored.shape == (1, 3, 256, 256)


def test_other_sizes_than_the_one_built_for_work() -> None:
    model = mini(image_size=28).eval()
    with torch.no_grad():
        for size in ((28, 28), (31, 19), (40, 64), (9, 8)):
            assert model(torch.rand(2, 1, *size)).restored.shape == (2, 1, *size)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("head", ["tanh", "spectral", "orthogonal", "linear"])
def test_the_classifier_gives_the_logits(mode: str, head: Any) -> None:
    model = mini(head=head).train(mode == "train")
    x = torch.rand(3, 1, 16, 16)
    logits = model(x).logits
    assert torch.equal(model.classifier()(x), logits)
    pre_squash = model.classifier(squash=False)(x)
    assert torch.equal(pre_squash.tanh() if head == "tanh" else pre_squash, logits)


def test_the_classifier_shares_the_models_mode_and_weights() -> None:
    model = mini()
    assert model.classifier().training
    assert not model.eval().classifier().training
    assert {id(p) for p in model.classifier().parameters()} == {id(p) for p in model.parameters()}


def test_taking_the_classifier_leaves_frozen_layers_frozen() -> None:
    model = mini().train()
    frozen = batch_norms(model)[0]
    frozen.eval()
    model.classifier()
    assert not frozen.training
    assert model.training


@PROTOCOLS
def test_in_training_both_passes_feed_shared_running_averages_front_first(protocol: str) -> None:
    model = mini(protocol=protocol, denoise="none", pass_statistics="shared")
    first = batch_norms(model)[0]
    seen: list[Tensor] = []
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    x = torch.rand(4, 1, 16, 16)
    out = model(x)
    counts = [int(m.num_batches_tracked) for m in batch_norms(model)]  # type: ignore[arg-type]
    assert set(counts[:5]) == {2}  # those of the stem and of layer1
    assert set(counts[5:]) == {1 if protocol == "improved" else 2}
    means = [inputs.mean(dim=(0, 2, 3)) for inputs in seen]
    momentum = first.momentum
    assert momentum is not None
    expected = (1 - momentum) * momentum * means[0] + momentum * means[1]
    assert first.running_mean is not None
    assert torch.allclose(first.running_mean, expected, atol=1e-6)
    assert not torch.allclose(first.running_mean, (1 - momentum) * momentum * means[1] + momentum * means[0], atol=1e-6)

    seen.clear()
    model.backbone(x)
    model.backbone(model.middle_denoise(out.restored.detach(), x))
    assert torch.allclose(seen[0].mean(dim=(0, 2, 3)), means[0], atol=1e-6)
    assert torch.allclose(seen[1].mean(dim=(0, 2, 3)), means[1], atol=1e-6)


def test_each_pass_has_its_own_running_averages_which_evaluation_uses() -> None:
    model = as_trained(mini(denoise="none", protocol="improved"))
    first = batch_norms(model)[0]
    seen: list[Tensor] = []
    hook = first.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    own = model.front_statistics
    assert own is not None
    name = next(name for name, module in model.backbone.named_modules() if module is first)
    before = {key: value.clone() for key, value in own.by_name().items()}
    x = torch.rand(8, 1, 16, 16)
    model(x)
    momentum = first.momentum
    assert momentum is not None
    averages = ((own.by_name(), before), (dict(first.named_buffers(prefix=name)), before))
    for inputs, (after, old) in zip(seen, averages, strict=True):
        expected = (1 - momentum) * old[f"{name}.running_mean"] + momentum * inputs.mean(dim=(0, 2, 3))
        assert torch.allclose(after[f"{name}.running_mean"], expected, atol=1e-6)
    hook.remove()

    model.eval()
    logits, restored = model(x)
    for key in own.by_name():
        if key.endswith("running_mean"):
            own.by_name()[key].add_(1.0)
    moved = model(x)
    assert not torch.allclose(moved.restored, restored, atol=1e-4)  # the front pass reads them
    assert torch.allclose(model.head(model.back(restored, x)), logits, atol=1e-6)  # the back pass does not


def test_a_model_saved_without_averages_for_each_pass_loads_with_shared_ones(tmp_path: Path) -> None:
    model = mini(protocol="improved", pass_statistics="shared").eval()
    model.save(tmp_path / "earlier")
    settings = json.loads((tmp_path / "earlier" / "config.json").read_text())
    del settings["model"]["pass_statistics"]
    (tmp_path / "earlier" / "config.json").write_text(json.dumps(settings))
    loaded = rf.load(tmp_path / "earlier")
    assert loaded.config.pass_statistics == "shared"
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_evaluation_changes_no_statistics() -> None:
    model = mini().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.rand(4, 1, 16, 16)).logits.sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_building_leaves_the_statistics_at_their_start() -> None:
    assert all(int(m.num_batches_tracked) == 0 for m in batch_norms(mini()))  # type: ignore[arg-type]


def test_in_evaluation_images_of_a_batch_do_not_mix() -> None:
    model = mini().eval()
    x = torch.rand(3, 1, 16, 16)
    with torch.no_grad():
        alone = torch.cat([model(image.unsqueeze(0)).logits for image in x])
        assert torch.allclose(model(x).logits, alone, atol=1e-5)


@pytest.mark.parametrize("net", ["resnet_mini", "regnetx_002"])
def test_the_seed_decides_the_weights_and_global_randomness_is_left_alone(net: str) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = rf.enhance(net, **MINI, seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    again = rf.enhance(net, **MINI, seed=3).state_dict()
    other = rf.enhance(net, **MINI, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    weights = {name: tensor for name, tensor in first.items() if name.endswith("weight") and tensor.ndim == 4}
    same = [name for name in weights if torch.equal(weights[name], other[name])]
    assert same == [name for name, tensor in weights.items() if not tensor.any()]
    assert same == [f"decoder.upscale.{len(rf.enhance(net, **MINI).decoder.upscale) - 1}.weight"]


@pytest.mark.parametrize(
    "images",
    [
        torch.rand(2, 3, 16, 16),
        torch.rand(1, 16, 16),
        torch.rand(16, 16),
        torch.zeros(2, 1, 16, 16, dtype=torch.uint8),
        torch.zeros(2, 1, 16, 16, dtype=torch.int64),
    ],
)
@pytest.mark.parametrize("defence", ["fpd", "none"])
def test_images_of_another_shape_or_type_are_refused(images: Tensor, defence: Any) -> None:
    task = rf.TaskConfig(num_classes=4, in_channels=1, image_size=(16, 16))
    model = rf.build(task, rf.ModelConfig(defence=defence))
    with pytest.raises(ValueError, match="images must be"):
        model(images)
    with pytest.raises(ValueError, match="images must be"):
        model.classifier()(images)


@PROTOCOLS
def test_images_are_normalised_inside_the_model(protocol: str) -> None:
    options: dict[str, Any] = {"in_channels": 3, "denoise": "none", "middle": "none", "protocol": protocol}
    plain = mini(**options).eval()
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    normalising = mini(**options, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).eval()
    x = torch.rand(2, 3, 16, 16)
    before = (x - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
    found, expected = normalising.restore(x), plain.restore(before)
    if protocol == "improved":  # the residual is added to the image as it is
        found, expected = found - x, expected - before
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.1, 0.2)}, "mean must have 1 or 3 values"),
        ({"std": (0.1, 0.2)}, "std must have 1 or 3 values"),
        ({"std": (0.1, 0.2, 0.0)}, "std must be positive"),
    ],
)
def test_constants_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mini(in_channels=3, **options)


def test_rgb_constants_are_averaged_for_grey_images() -> None:
    model = mini(mean=(0.1, 0.2, 0.3))
    assert isinstance(model.mean, Tensor)
    assert float(model.mean) == pytest.approx(0.2)


def test_dropout_acts_in_training_only() -> None:
    x = torch.rand(8, 1, 16, 16)
    dropping, keeping = mini(dropout=0.5), mini()
    assert torch.equal(keeping(x).logits, keeping(x).logits)
    assert not torch.equal(dropping(x).logits, dropping(x).logits)
    assert torch.equal(dropping(x).restored, dropping(x).restored)
    assert torch.equal(dropping.eval()(x).logits, dropping(x).logits)


@PROTOCOLS
def test_gradients_reach_every_parameter_and_the_image(protocol: str) -> None:
    model = mini(denoise="bottleneck", head="orthogonal", protocol=protocol)
    x = torch.rand(4, 1, 16, 16, requires_grad=True)
    out = model(x)
    (out.logits.square().sum() + out.restored.square().sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert x.grad is not None
    assert float(x.grad.abs().min()) > 0


def test_the_restoration_alone_does_not_train_the_head() -> None:
    model = mini()
    model(torch.rand(2, 1, 16, 16)).restored.sum().backward()
    assert all(p.grad is None for p in model.head.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())


@pytest.mark.parametrize(("channels", "width"), [(None, 32), (8, 8)])
def test_the_pyramids_width(channels: int | None, width: int) -> None:
    assert mini(pyramid_channels=channels).decoder.smooth.out_channels == width


def test_the_baseline_is_pooling_and_a_linear_layer() -> None:
    task = rf.TaskConfig(num_classes=4, in_channels=1, image_size=(16, 16))
    model = rf.build(task, corrected(denoise="bottleneck", dropout=0.5).baseline()).eval()
    assert isinstance(model, rf.Baseline)
    assert not model.backbone.inserted
    assert not any(isinstance(m, nn.ELU) for m in model.modules())
    x = torch.rand(2, 1, 16, 16)
    linear = model.head.linear
    assert isinstance(linear, nn.Linear)
    expected = F.linear(model.backbone(x)[-1].mean(dim=(2, 3)), linear.weight, linear.bias)
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert model.classifier() is model


def test_improveds_baseline_is_the_network_itself() -> None:
    net = resnet_mini(1, num_classes=4).eval()
    task = rf.TaskConfig(num_classes=4, in_channels=1, image_size=(16, 16))
    config = rf.ModelConfig(backbone="custom", denoise="bottleneck", mean=(0.2,), std=(0.5,))
    baseline = rf.build(task, config.baseline(), net=net).eval()
    assert isinstance(baseline, rf.Baseline)
    assert not baseline.backbone.inserted
    x = torch.rand(2, 1, 16, 16)
    assert torch.allclose(baseline(x), net((x - 0.2) / 0.5), rtol=1e-5, atol=1e-6)


def test_the_baseline_starts_with_the_same_backbone() -> None:
    task = rf.TaskConfig(num_classes=4, in_channels=1, image_size=(16, 16))
    config = rf.ModelConfig(denoise="none")
    ours, baseline = rf.build(task, config, seed=2), rf.build(task, config.baseline(), seed=2)
    expected = ours.backbone.state_dict()
    assert expected.keys() == baseline.backbone.state_dict().keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in baseline.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("options", "near"),
    [({"heads": "tanh"}, "'head'"), ({"denoize": "dot"}, "'denoise'"), ({"pyramid_chanels": 3}, "'pyramid_channels'")],
)
def test_an_unknown_option_names_the_nearest(options: dict[str, Any], near: str) -> None:
    with pytest.raises(ValueError, match=near):
        mini(**options)


@pytest.mark.parametrize(
    ("options", "field"),
    [({"head": "tan"}, "head"), ({"dropout": 1.0}, "dropout"), ({"num_classes": 1}, "num_classes")],
)
def test_a_wrong_value_names_its_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: "):
        mini(**options)


def test_enhance_builds_no_baseline() -> None:
    with pytest.raises(InputError, match="undefended baseline"):
        mini(defence="none")


def test_an_unknown_backbone_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"unknown backbone 'resnet_mni'; did you mean 'resnet_mini'"):
        rf.enhance("resnet_mni", **MINI)


def test_a_backbone_without_stages_is_refused() -> None:
    with pytest.raises(InputError, match="stages"):
        rf.enhance(nn.Sequential(nn.Conv2d(1, 2, 1)), **MINI)


def test_a_custom_backbone_needs_its_module_and_no_other_takes_one() -> None:
    task = rf.TaskConfig(num_classes=4, in_channels=1, image_size=(16, 16))
    with pytest.raises(InputError, match="net="):
        rf.build(task, rf.ModelConfig(backbone="custom", stages=("0",)))
    with pytest.raises(InputError, match="net"):
        rf.build(task, rf.ModelConfig(), net=nn.Conv2d(1, 2, 1))


def test_resnet_mini_has_no_pretrained_weights() -> None:
    with pytest.raises(InputError, match="no pretrained weights"):
        mini(pretrained=True)


def test_pretrained_weights_and_constants_reach_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    donor = timm.create_model("resnet18", num_classes=4).state_dict()

    def fetch(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        model.load_state_dict(donor)

    monkeypatch.setattr(timm.models._builder, "load_pretrained", fetch)
    model = rf.enhance("resnet18", num_classes=4, image_size=64, pretrained=True)
    head = {f"fc.{name}": tensor for name, tensor in model.head.linear.state_dict().items()}
    found = {**model.backbone.net.state_dict(), **head}
    assert found.keys() == donor.keys()
    assert all(torch.equal(found[name], donor[name]) for name in donor)
    cfg: Any = timm.create_model("resnet18").pretrained_cfg
    assert isinstance(model.mean, Tensor)
    assert isinstance(model.std, Tensor)
    assert model.mean.flatten().tolist() == pytest.approx(cfg["mean"])
    assert model.std.flatten().tolist() == pytest.approx(cfg["std"])


def test_weights_of_a_timm_network_fit_under_their_own_names() -> None:
    donor = timm.create_model("regnetx_002", num_classes=0)
    model = rf.enhance("regnetx_002", num_classes=4, image_size=32)
    model.backbone.net.load_state_dict(donor.state_dict())
    assert json.dumps(sorted(model.backbone.net.state_dict())) == json.dumps(sorted(donor.state_dict()))


def test_a_users_module_keeps_its_weights(chain: nn.Module, chain_stages: tuple[str, ...]) -> None:
    model = rf.enhance(chain, stages=chain_stages, num_classes=5, image_size=(16, 20), front_stages=None)
    expected = chain.state_dict()
    found = model.backbone.net.state_dict()
    found |= {f"head.{name}": tensor for name, tensor in model.head.linear.state_dict().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    out = model(torch.rand(2, 3, 16, 20))
    assert out.restored.shape == (2, 3, 16, 20)
    assert len(model.decoder.laterals) == 3


@pytest.mark.parametrize("options", [{}, {"denoise": "normalised", "denoise_after": (0,)}])
def test_a_network_of_one_stage(options: dict[str, Any]) -> None:
    net = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU())
    model = rf.enhance(net, stages=["1"], num_classes=2, in_channels=1, image_size=9, **options)
    assert model(torch.rand(2, 1, 9, 9)).restored.shape == (2, 1, 9, 9)


def test_more_front_stages_than_the_network_has_are_refused() -> None:
    assert mini(front_stages=5).backbone.front == 5
    with pytest.raises(InputError, match=r"front_stages must be at most the number of 5 stages \(.*layer4\), found 6"):
        mini(front_stages=6)


class Flattens(nn.Module):
    """A network that flattens its maps by `view`, which takes no maps in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU())
        self.classifier = nn.Linear(6 * 2 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.b(self.a(x)).view(-1, 24))
        return out


@pytest.mark.parametrize(
    "options",
    [{}, {"tail": "pooling"}, {"denoise": "normalised"}, {"protocol": "corrected", "denoise": "softmax"}],
)  # fmt: skip
def test_a_network_that_flattens_by_view_is_wrapped_trained_and_loaded(tmp_path: Path, options: dict[str, Any]) -> None:
    net = Flattens()
    model = rf.enhance(net, stages=["a", "b"], num_classes=3, in_channels=1, image_size=8, **options)
    x = torch.rand(4, 1, 8, 8)
    out = model.train()(x)
    out.logits.sum().backward()
    if not {"tail", "protocol"} & set(options):
        assert torch.allclose(out.logits, net(x), atol=1e-6)
    as_trained(model.eval()).save(tmp_path / "model")
    assert torch.equal(rf.load(tmp_path / "model", net=Flattens())(x).logits, model(x).logits)
    baseline = rf.build(model.task, model.config.baseline(), net=net)
    assert baseline(x).shape == (4, 3)


class Named(Flattens):
    """A network that returns a dictionary."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


def test_a_network_that_returns_no_tensor_is_refused() -> None:
    with pytest.raises(InputError, match=r"must return a tensor, or a tuple that begins with one, found dict"):
        rf.enhance(Named(), stages=["a", "b"], num_classes=3, in_channels=1, image_size=8)


def test_enhance_builds_no_published_network() -> None:
    with pytest.raises(InputError, match=r"robustfpd\.recipe\(name, protocol=\"published\"\)"):
        rf.enhance("resnet_mini", **MINI, protocol="published")


@pytest.mark.parametrize("restore", [True, False])
@pytest.mark.parametrize("images", [torch.zeros(2, 3, 16, 16), torch.zeros(2, 1, 16, 16, dtype=torch.uint8)])
def test_images_are_checked_with_and_without_restoration(images: Tensor, restore: bool) -> None:
    with pytest.raises(InputError, match=r"^images must be"):
        mini()(images, restore=restore)


def test_images_in_double_precision_go_through_a_float32_model() -> None:
    model = mini(image_size=8, pyramid_channels=8).eval()
    images = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        expected, found = model(images), model(images.double())
    assert torch.allclose(found.logits.float(), expected.logits, atol=1e-3)
    assert torch.allclose(found.restored.float(), expected.restored, atol=1e-4)


def test_a_numpy_array_is_refused() -> None:
    model = rf.enhance("resnet_mini", num_classes=4, in_channels=1, image_size=8, pyramid_channels=8)
    with pytest.raises(InputError, match=r"images must be a torch\.Tensor, found ndarray"):
        model(torch.rand(3, 1, 8, 8).numpy())


def test_a_network_that_is_nan_until_its_norms_are_trained_says_so() -> None:
    with pytest.warns(UserWarning, match="in evaluation mode until its batch norms have seen training images"):
        model = rf.enhance(
            "densenet121", num_classes=4, in_channels=1, image_size=28, pyramid_channels=8, protocol="corrected"
        )
    assert bool(model.train()(torch.rand(4, 1, 28, 28)).logits.isfinite().all())


@pytest.mark.parametrize(
    ("protocol", "denoise"),
    [("improved", "normalised"), *(("corrected", kind) for kind in ("dot", "softmax", "gaussian", "bottleneck"))],
)
def test_autocast_changes_the_outputs_little(protocol: str, denoise: str) -> None:
    model = mini(protocol=protocol, denoise=denoise).train()
    images = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    model(images)
    model.eval()
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images)
    assert found.restored.dtype == torch.float32  # bfloat16 has too few bits for an image
    assert torch.allclose(found.restored, expected.restored, atol=0.05)
    assert torch.allclose(found.logits.float(), expected.logits, atol=0.05)
    found.restored.square().sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
