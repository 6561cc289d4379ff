from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fpds import GATED, as_trained, corrected, gated
from torch import Tensor, nn

import robustfpd as rf
from robustfpd.errors import InputError, MissingDataError
from robustfpd.io import readable_folder, replace_folder
from robustfpd.models.checkpoint import CONFIG, EARLIER, FORMAT, WEIGHTS
from robustfpd.models.small_networks import resnet_mini

TASK = rf.TaskConfig(num_classes=4, in_channels=1, image_size=(12, 16))


def trained(**options: Any) -> rf.FPD | rf.Baseline:
    """A model whose running statistics, gates and restoration are no longer those of a fresh one."""
    return seasoned(rf.build(TASK, rf.ModelConfig(**options), seed=1))


def seasoned(model: rf.FPD | rf.Baseline) -> rf.FPD | rf.Baseline:
    if isinstance(model, rf.FPD):
        as_trained(model)
    model.train()(torch.rand(4, model.task.in_channels, *model.task.image_size))
    return model.eval()


def logits(model: nn.Module, channels: int = 1, size: tuple[int, int] = (12, 16)) -> Tensor:
    x = torch.rand(3, channels, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out: Tensor = model(x)
    return out


def assert_same(first: rf.FPD | rf.Baseline, second: rf.FPD | rf.Baseline, channels: int = 1) -> None:
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in second.state_dict().items())
    size = first.task.image_size
    assert torch.equal(logits(first.classifier(), channels, size), logits(second.classifier(), channels, size))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trained().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "options",
    [
        {},
        GATED,
        {"defence": "none", "activation": "keep"},
        gated(front_stages=None, pyramid_channels=None, denoise="softmax", restoration_scale=0.5),
        gated(restoration="image", denoise_gate=False, front_stages=4),
        corrected().model_dump(),
        {**corrected().model_dump(), "head": "spectral", "activation": "keep"},
        gated(head="orthogonal", denoise="bottleneck", mean=(0.3,), std=(0.7,)),
        gated(head="spectral", lipschitz=2.0, small_stem=False, pyramid_channels=5),
        gated(stages=("act1", "layer2", "layer3"), denoise_after=(2,), middle="restored"),
    ],
)
def test_a_model_comes_back_as_it_was(tmp_path: Path, options: dict[str, Any]) -> None:
    model = trained(**options)
    model.save(tmp_path / "model")
    loaded = rf.load(tmp_path / "model")
    assert type(loaded) is type(model)
    assert not any(m.training for m in loaded.modules())
    assert (loaded.task, loaded.config) == (model.task, model.config)
    assert_same(model, loaded)


def test_a_model_in_training_is_saved_too(tmp_path: Path) -> None:
    model = trained().train()
    model.save(str(tmp_path / "model"))
    assert model.training
    assert_same(model.eval(), rf.load(str(tmp_path / "model")))


def test_a_model_around_a_users_module(tmp_path: Path, chain: nn.Module, chain_stages: tuple[str, ...]) -> None:
    model = rf.enhance(chain, stages=chain_stages, num_classes=5, image_size=(12, 16)).eval()
    model.save(tmp_path / "model")
    with pytest.raises(InputError, match="net="):
        rf.load(tmp_path / "model")
    like = copy.deepcopy(chain)
    for parameter in like.parameters():
        nn.init.zeros_(parameter)
    loaded = rf.load(tmp_path / "model", net=like)
    assert loaded.config.stages == chain_stages
    assert_same(model, loaded, channels=3)
    assert all(not parameter.any() for parameter in like.parameters())


class Tied(nn.Module):
    """Two names for one convolution's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 1, 3, padding=1)
        self.second = nn.Conv2d(1, 1, 3, padding=1)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


def test_shared_weights_are_saved(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_classes": 2, "in_channels": 1, "image_size": (12, 16), "activation": "keep"}
    model = rf.enhance(Tied(), stages=("first", "second"), **options).eval()
    model.save(tmp_path / "model")
    assert_same(model, rf.load(tmp_path / "model", net=Tied()))


def test_a_pretrained_model_is_loaded_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def fill(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.01)

    monkeypatch.setattr(timm.models._builder, "load_pretrained", fill)
    model = rf.enhance("regnetx_002", num_classes=4, image_size=(12, 16), pretrained=True).eval()
    model.save(tmp_path / "model")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("no weights are needed")

    monkeypatch.setattr(timm.models._builder, "load_pretrained", refuse)
    loaded = rf.load(tmp_path / "model")
    assert loaded.config.pretrained
    assert loaded.config == model.config
    assert_same(model, loaded, channels=3)
    loaded.save(tmp_path / "again")
    assert_same(model, rf.load(tmp_path / "again"), channels=3)


def earlier(folder: Path) -> None:
    """Rewrite a model's settings as the version before `improved` wrote them."""
    path = folder / CONFIG
    settings = json.loads(path.read_text())
    assert settings["format"] == FORMAT == 2
    for field in ("tail", "denoise_gate", "front_stages", "restoration"):
        del settings["model"][field]
    path.write_text(json.dumps({**settings, "format": EARLIER}))


@pytest.mark.parametrize(
    "options", [{}, {"pyramid_channels": 8, "head": "spectral"}, {"activation": "keep", "small_stem": False}]
)
def test_a_model_of_an_earlier_version_is_the_papers_network(tmp_path: Path, options: dict[str, Any]) -> None:
    model = seasoned(rf.build(TASK, corrected(**options), seed=1))
    model.save(tmp_path / "model")
    earlier(tmp_path / "model")
    loaded = rf.load(tmp_path / "model")
    assert loaded.config == model.config
    assert_same(model, loaded)


def test_a_baseline_of_an_earlier_version_has_a_new_head_on_the_pooled_maps(tmp_path: Path) -> None:
    model = seasoned(rf.build(TASK, corrected().baseline(), seed=1))
    model.save(tmp_path / "model")
    earlier(tmp_path / "model")
    loaded = rf.load(tmp_path / "model")
    assert loaded.config.tail == "pooling"
    assert_same(model, loaded)


def test_improved_models_come_back_around_each_kind_of_network(tmp_path: Path) -> None:
    """One by timm's name, one by a factory of torchvision's and one around a module, with new classes and their own."""
    task = rf.TaskConfig(num_classes=4, in_channels=3, image_size=(32, 32))
    for index, backbone in enumerate(
        ("regnetx_002", "torchvision.models:resnet18", "torchvision.models:squeezenet1_1")
    ):
        stages = ("features.1", "features.4", "features.7") if "squeezenet" in backbone else None
        model = seasoned(rf.build(task, rf.ModelConfig(backbone=backbone, stages=stages)))
        model.save(tmp_path / str(index))
        assert_same(model, rf.load(tmp_path / str(index)), channels=3)
    for classes in (4, 10):
        model = seasoned(rf.build(task, rf.ModelConfig(backbone="custom"), net=resnet_mini(3, num_classes=classes)))
        model.save(tmp_path / f"custom{classes}")
        like = resnet_mini(3, num_classes=classes)
        for parameter in like.parameters():
            nn.init.zeros_(parameter)
        assert_same(model, rf.load(tmp_path / f"custom{classes}", net=like), channels=3)


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle")

    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refuse)
    for module in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(f"pickle.{module}", refuse)
    rf.build(TASK, rf.ModelConfig()).save(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [CONFIG, WEIGHTS]
    rf.load(tmp_path / "model")
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_the_files_are_readable_by_others(saved: Path) -> None:
    settings = json.loads((saved / CONFIG).read_text())
    assert settings["format"] == FORMAT
    assert settings["task"]["num_classes"] == 4
    assert load_file(saved / WEIGHTS)["head.linear.weight"].shape == (4, 128)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_damaged_weights_are_an_input_error_with_the_path(saved: Path, kept: float) -> None:
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: int(len(content) * kept) if kept == 0.5 else int(kept)])
    with pytest.raises(InputError) as caught:
        rf.load(saved)
    assert str(saved / WEIGHTS) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"format": 1}', '{"format": 1, "task": 3, "model": {}}', "\x00"]
)
def test_damaged_settings_are_an_input_error_with_the_path(saved: Path, text: str) -> None:
    (saved / CONFIG).write_text(text)
    with pytest.raises(InputError) as caught:
        rf.load(saved)
    assert str(saved / CONFIG) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_are_not_text_are_an_input_error(saved: Path) -> None:
    (saved / CONFIG).write_bytes(b"\xff\xfe\x80")
    with pytest.raises(InputError, match=CONFIG):
        rf.load(saved)


@pytest.mark.parametrize("rest", [{"task": {}, "model": {}}, {"networks": []}])
def test_another_format_is_named(saved: Path, rest: dict[str, Any]) -> None:
    (saved / CONFIG).write_text(json.dumps({"format": FORMAT + 1, **rest}))
    with pytest.raises(InputError, match=f"has format {FORMAT + 1}, this robustfpd reads {EARLIER} and {FORMAT}"):
        rf.load(saved)


def test_an_unknown_setting_is_named(saved: Path) -> None:
    settings = json.loads((saved / CONFIG).read_text())
    settings["model"]["hed"] = "tanh"
    (saved / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"unknown field 'hed'; did you mean 'head'"):
        rf.load(saved)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(MissingDataError) as caught:
        rf.load(saved)
    assert name in str(caught.value)
    assert str(saved) in str(caught.value)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="nowhere"):
        rf.load(tmp_path / "nowhere")


def test_weights_of_another_architecture_are_an_input_error(saved: Path) -> None:
    other = rf.enhance("regnetx_002", num_classes=4, in_channels=1, image_size=(12, 16))
    save_file({name: t.contiguous() for name, t in other.state_dict().items()}, saved / WEIGHTS)
    with pytest.raises(InputError) as caught:
        rf.load(saved)
    assert str(saved) in str(caught.value)
    assert "do not fit backbone 'resnet_mini'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_for_other_classes_are_an_input_error(saved: Path) -> None:
    settings = json.loads((saved / CONFIG).read_text())
    settings["task"]["num_classes"] = 5
    (saved / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"head.linear.weight"):
        rf.load(saved)


def test_a_runs_folder_gives_its_best_checkpoint(tmp_path: Path) -> None:
    model = trained()
    model.save(tmp_path / "run" / "checkpoints" / "best")
    assert_same(model, rf.load(tmp_path / "run"))


def test_a_model_in_the_working_folder_loads(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    assert isinstance(rf.load("."), rf.FPD)


def test_the_working_folder_is_not_replaced(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    with pytest.raises(InputError, match="working folder"):
        trained().save(".")
    assert isinstance(rf.load(saved), rf.FPD)


def test_a_saved_model_is_replaced(saved: Path) -> None:
    other = trained(head="linear")
    other.save(saved)
    assert_same(other, rf.load(saved))
    assert list(saved.parent.iterdir()) == [saved]


def test_a_model_behind_a_link_is_replaced_twice(saved: Path) -> None:
    link = saved.parent / "link"
    link.symlink_to(saved, target_is_directory=True)
    for head in ("linear", "spectral"):
        other = trained(head=head)
        other.save(link)
        assert_same(other, rf.load(link))
        assert_same(other, rf.load(saved))
    assert link.is_symlink()
    assert sorted(saved.parent.iterdir()) == [link, saved]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        trained().save(folder)
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]
    assert (folder / "thesis.tex").read_text() == "years of work"


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is a file"):
        trained().save(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("cut", [1, 2])
def test_an_interruption_at_a_rename_leaves_the_old_model(saved: Path, cut: int) -> None:
    before = rf.load(saved)
    renames = 0
    original = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if renames == cut:
            raise KeyboardInterrupt
        return original(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(head="linear").save(saved)
    assert_same(before, rf.load(saved))

    other = trained(head="spectral")
    other.save(saved)
    assert_same(other, rf.load(saved))
    assert list(saved.parent.iterdir()) == [saved]


def test_an_interruption_while_writing_leaves_the_old_files(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / "a").write_text("old")

    def cut_off() -> None:
        with replace_folder(folder) as new:
            (new / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert (folder / "a").read_text() == "old"
    with replace_folder(folder) as new:
        assert not list(new.iterdir())
        (new / "b").write_text("new")
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"b": "new"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_reader_between_the_writers_two_renames_finds_the_old_and_moves_nothing(tmp_path: Path) -> None:
    old = tmp_path / ".kept.old"
    old.mkdir()
    (old / "a").write_text("old")
    assert (readable_folder(tmp_path / "kept") / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_an_old_version_does_not_hide_the_current_folder(tmp_path: Path) -> None:
    folder, old = tmp_path / "kept", tmp_path / ".kept.old"
    for path, text in ((folder, "new"), (old, "old")):
        path.mkdir()
        (path / "a").write_text(text)
    assert (readable_folder(folder) / "a").read_text() == "new"


@pytest.mark.parametrize("defence", ["fpd", "none"])
def test_save_pretrained_and_from_pretrained_use_the_same_files_as_save(defence: Any, tmp_path: Path) -> None:
    task = rf.TaskConfig(num_classes=3, in_channels=1, image_size=(8, 8))
    model = rf.build(task, rf.ModelConfig(defence=defence, pyramid_channels=8)).eval()
    model.save_pretrained(tmp_path / "hub")
    model.save(tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "hub" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "library_name: robustfpd" in card
    loaded = type(model).from_pretrained(tmp_path / "hub")
    assert type(loaded) is type(model)
    assert not loaded.training
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded.classifier()(images), model.classifier()(images))
    assert torch.equal(rf.load(tmp_path / "hub").classifier()(images), model.classifier()(images))
    loaded.save_pretrained(tmp_path / "hub")
    assert (tmp_path / "hub" / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()
    other = rf.Baseline if defence == "fpd" else rf.FPD
    with pytest.raises(InputError, match=rf"is no {other.__name__}; load it with {type(model).__name__}.from_pretr"):
        other.from_pretrained(tmp_path / "hub")


def test_from_pretrained_downloads_only_the_models_two_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.hub_mixin

    from robustfpd.models import fpd

    rf.enhance("resnet_mini", num_classes=3, in_channels=1, image_size=8, pyramid_channels=8).save(tmp_path / "repo")
    requests: list[Any] = []

    def snapshot(repo: str, *, allow_patterns: list[str], revision: str, **options: Any) -> str:
        requests.append((repo, sorted(allow_patterns), revision))
        return str(tmp_path / "repo")

    config = str(tmp_path / "repo" / "config.json")
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", lambda **options: config)
    monkeypatch.setattr(fpd, "snapshot_download", snapshot)
    model = rf.FPD.from_pretrained("someone/digits", revision="v1")
    assert model.task.num_classes == 3
    assert requests == [("someone/digits", ["config.json", "model.safetensors"], "v1")]


def test_from_pretrained_takes_the_users_own_module(
    tmp_path: Path, chain: nn.Module, chain_stages: tuple[str, ...]
) -> None:
    rf.enhance(chain, stages=chain_stages, num_classes=5, image_size=16).save_pretrained(tmp_path / "hub")
    with pytest.raises(InputError, match="net="):
        rf.FPD.from_pretrained(tmp_path / "hub")
    assert rf.FPD.from_pretrained(tmp_path / "hub", net=chain).task.num_classes == 5
