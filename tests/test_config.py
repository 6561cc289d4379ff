from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from robustfpd.config import (
    AugmentConfig,
    Config,
    ModelConfig,
    RunConfig,
    TaskConfig,
    TrainingConfig,
    load_run,
    parse,
    protocol_defaults,
    recipe,
    recipe_names,
)
from robustfpd.data import names
from robustfpd.errors import InputError


def messages(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        recipe("digits/mini", overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def sections(cls: type[Config]) -> list[type[Config]]:
    kinds = [field.annotation for field in cls.model_fields.values()]
    inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Config)]
    return [cls, *(found for kind in inner for found in sections(kind))]


def test_recipe_names_are_sorted() -> None:
    assert "digits/mini" in recipe_names()
    assert recipe_names() == sorted(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_packaged_recipe_parses_and_names_a_data_set(name: str) -> None:
    run = recipe(name)
    assert run.recipe == name
    assert run.data.dataset == name.split("/")[0]
    assert run.data.dataset in names()


@pytest.mark.parametrize("section", [*sections(RunConfig), TaskConfig])
def test_every_field_is_documented(section: type[Config]) -> None:
    assert section.__doc__
    assert not [name for name, field in section.model_fields.items() if not field.description]


def test_overrides_are_yaml_values() -> None:
    run = recipe(
        "digits/mini",
        [
            "training.optimizer.lr=1e-3",
            "training.epochs=3",
            "training.clip_grad_norm=null",
            "data.augment.flip=true",
            "model.denoise=none",
            "model.stages=[a, b.c]",
            "model.small_stem=no",
            "evaluation.eps=[0.1, 0.2]",
            "recipe=a=b",
        ],
    )
    assert (run.training.optimizer.lr, run.training.epochs, run.training.clip_grad_norm) == (1e-3, 3, None)
    assert run.data.augment == AugmentConfig(flip=True)
    assert run.model.denoise == "none"
    assert run.model.stages == ("a", "b.c")
    assert run.model.small_stem is False
    assert run.evaluation.eps == (0.1, 0.2)
    assert run.recipe == "a=b"


def test_the_last_override_counts_and_the_others_stay() -> None:
    run = recipe("digits/mini", ["training.epochs=3", "training.epochs=4"])
    assert run == recipe("digits/mini").model_copy(
        update={"training": recipe("digits/mini").training.model_copy(update={"epochs": 4})}
    )


@pytest.mark.parametrize("override", ["training.epochs", "=3", "epochs 3"])
def test_an_override_without_field_or_value_shows_the_form(override: str) -> None:
    assert "field=value" in messages(override)


def test_an_override_below_a_value_is_refused() -> None:
    assert "epochs is a value" in messages("training.epochs.x=3")


def test_an_override_that_is_not_yaml_is_refused() -> None:
    assert "'[1' is not a YAML value" in messages("evaluation.eps=[1")


def test_a_group_cannot_be_a_value() -> None:
    assert messages("training=3").startswith("training: ")


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("data.augment.rotaton=3", "'data.augment.rotation'"),
        ("model.denoize=dot", "'model.denoise'"),
        ("training.epoch=3", "'training.epochs'"),
        ("trainng.epochs=3", "'training'"),
    ],
)
def test_an_unknown_field_names_the_nearest(override: str, near: str) -> None:
    message = messages(override)
    assert "unknown field" in message
    assert near in message
    assert "digits/mini" in message


@pytest.mark.parametrize(
    ("override", "field", "choices"),
    [
        ("model.denoise=dots", "model.denoise", ("dot", "bottleneck", "softmax", "gaussian", "none")),
        ("model.head=tan", "model.head", ("tanh", "spectral", "orthogonal", "linear")),
        ("model.small_stem=maybe", "model.small_stem", ("auto", "True", "False")),
        ("model.defence=fdp", "model.defence", ("fpd", "none")),
        ("training.second_pass=no-such", "training.second_pass", ("detached", "joint")),
        ("training.schedule.name=step", "training.schedule.name", ("constant", "plateau", "cosine", "one_cycle")),
    ],
)
def test_a_wrong_choice_names_field_and_choices(override: str, field: str, choices: tuple[str, ...]) -> None:
    message = messages(override)
    assert message.startswith(f"{field}: ")
    assert all(choice in message for choice in choices)


@pytest.mark.parametrize(
    ("override", "start", "found"),
    [
        ("training.epochs=0", "training.epochs: ", "found 0"),
        ("training.epochs=many", "training.epochs: ", "found 'many'"),
        ("training.clip_grad_norm=-1", "training.clip_grad_norm: ", "found -1"),
        ("model.dropout=1", "model.dropout: ", "found 1"),
        ("model.mean=[a]", "model.mean.0: ", "found 'a'"),
        ("evaluation.eps=0.1", "evaluation.eps: ", "found 0.1"),
    ],
)
def test_a_value_out_of_range_is_shown(override: str, start: str, found: str) -> None:
    message = messages(override)
    assert message.startswith(start)
    assert found in message


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"^unknown recipe 'digit/mini'; did you mean 'digits/mini'"):
        recipe("digit/mini")
    with pytest.raises(InputError, match=r"^nosuch\.yaml cannot be read"):
        recipe("nosuch.yaml")


def test_a_recipe_may_be_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("training: {epochs: 2}\n")
    run = recipe(str(path), ["seed=5"])
    assert (run.training.epochs, run.seed, run.recipe) == (2, 5, str(path))


@pytest.mark.parametrize("text", ["a: [", "- 1", "3", ""])
def test_a_file_that_holds_no_settings_is_an_input_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_run(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.yaml"):
        load_run(tmp_path / "nothing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match=r"binary\.yaml"):
        load_run(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_a_run_survives_yaml(tmp_path: Path, name: str) -> None:
    run = recipe(name, ["model.mean=[0.1]", "model.std=[0.3]", "model.stages=[x, y]", "data.root=dätä"])
    run.save(tmp_path / "config.yaml")
    assert load_run(tmp_path / "config.yaml") == run


def test_a_recipe_is_improved_unless_another_protocol_is_asked_for() -> None:
    run = recipe("digits/mini")
    assert run.protocol == "improved"
    defaults = ModelConfig(), TrainingConfig()
    assert (run.model.restoration, run.model.tail, run.model.front_stages) == ("residual", "own", 1)
    assert (run.model.denoise, run.model.middle, run.model.restoration_scale) == ("none", "none", 0.1)
    assert (run.training.restoration_start, run.training.second_pass_interval) == (0.2, 8)
    for section, values, own in zip(("model", "training"), (run.model, run.training), defaults, strict=True):
        for field in protocol_defaults("corrected", section):
            assert getattr(values, field) == getattr(own, field), field


def test_protocol_defaults_are_those_that_differ_and_fields_of_their_section() -> None:
    assert protocol_defaults("improved") == protocol_defaults("improved", "model") == {}
    both = protocol_defaults("corrected")
    assert both == protocol_defaults("published")
    assert both == {
        section: protocol_defaults("corrected", section) for section in ("model", "training", "adversarial")
    }
    run = parse(RunConfig, both)
    for section, fields in both.items():
        for field, value in fields.items():
            assert getattr(getattr(run, section), field) == value
            assert getattr(getattr(RunConfig(), section), field) != value, field
    with pytest.raises(InputError, match="unknown protocol 'improve'; did you mean 'improved'"):
        protocol_defaults("improve")


NEW_FIELDS = {
    "model": ("tail", "denoise_gate", "front_stages", "restoration"),
    "training": ("middle_noise", "threshold_unit", "restoration_unit", "second_pass_interval", "restoration_start"),
}


@pytest.mark.parametrize("protocol", ["corrected", "published"])
@pytest.mark.parametrize("baseline", [False, True])
def test_a_run_of_an_earlier_version_keeps_the_papers_settings(tmp_path: Path, protocol: str, baseline: bool) -> None:
    run = recipe("mnist/mini", ["training.noise=0.1"], protocol=protocol)
    run = run.baseline() if baseline else run
    run.save(tmp_path / "config.yaml")
    values = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for section, fields in NEW_FIELDS.items():
        for field in fields:
            del values[section][field]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_run(tmp_path / "config.yaml") == run


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    seed=st.integers(-(2**31), 2**31),
    eps=st.lists(st.floats(1e-6, 1), min_size=1, max_size=3),
    lr=st.floats(1e-8, 1e3),
    small_stem=st.sampled_from([True, False, "auto"]),
    clip=st.one_of(st.none(), st.floats(1e-6, 1e6)),
)
def test_numbers_survive_yaml_exactly(seed: int, eps: list[float], lr: float, small_stem: Any, clip: Any) -> None:
    values = {
        "seed": seed,
        "evaluation": {"eps": eps},
        "model": {"small_stem": small_stem},
        "training": {"clip_grad_norm": clip, "optimizer": {"lr": lr}},
    }
    run = parse(RunConfig, values)
    again = parse(RunConfig, yaml.safe_load(yaml.safe_dump(run.model_dump(mode="json"))))
    assert again == run
    assert again.model.small_stem is small_stem or again.model.small_stem == "auto"


def test_an_int_is_a_square() -> None:
    assert parse(TaskConfig, {"num_classes": 2, "image_size": 28}).image_size == (28, 28)
    assert parse(TaskConfig, {"num_classes": 2, "image_size": [27, 33]}).image_size == (27, 33)


@pytest.mark.parametrize("size", [0, -3, (0, 5), (5,), (5, 5, 5), "28", 2.5])
def test_invalid_image_sizes_are_refused(size: Any) -> None:
    with pytest.raises(InputError, match="image_size"):
        parse(TaskConfig, {"num_classes": 2, "image_size": size})


@pytest.mark.parametrize("values", [{"num_classes": 1, "image_size": 8}, {"image_size": 8}])
def test_a_task_needs_two_classes(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^num_classes: "):
        parse(TaskConfig, values)


def test_a_setting_cannot_be_changed_in_place() -> None:
    run = RunConfig()
    with pytest.raises(ValidationError):
        run.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        run.training.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize("second_pass", ["detached", "joint"])
@pytest.mark.parametrize("name", recipe_names())
def test_the_baseline_sees_the_same_images_and_takes_the_same_steps(name: str, second_pass: str) -> None:
    run = recipe(name, [f"training.second_pass={second_pass}"])
    baseline = run.baseline()
    assert baseline.data == run.data
    assert baseline.evaluation == run.evaluation
    assert (baseline.seed, baseline.recipe) == (run.seed, run.recipe)
    alone, interval = run.training.restoration_start, run.training.second_pass_interval
    assert interval > 1
    steps_a_batch = 1 + (1 - alone) / interval if second_pass == "detached" else 1
    assert baseline.training.epochs == round(run.training.epochs * steps_a_batch)
    corrected = recipe(name, [f"training.second_pass={second_pass}"], protocol="corrected")
    steps_a_batch = 2 if second_pass == "detached" else 1
    assert corrected.baseline().training.epochs == corrected.training.epochs * steps_a_batch
    kept = {"epochs", "early_stop_patience", "schedule"}
    assert baseline.training.model_dump(exclude=kept) == run.training.model_dump(exclude=kept)
    assert baseline.training.schedule.name == run.training.schedule.name


@pytest.mark.parametrize(
    ("training", "adversarial", "epochs"),
    [
        ({"second_pass_interval": 1, "restoration_start": 0}, {}, (24, 24)),
        ({"second_pass_interval": 1, "restoration_start": 0.5}, {}, (18, 24)),
        ({"second_pass_interval": 3, "restoration_start": 0.5}, {}, (14, 16)),
        ({"second_pass_interval": 1, "restoration_start": 0.5}, {"second_pass": False}, (18, 12)),
        ({"second_pass": "joint"}, {}, (12, 12)),
    ],
)
def test_the_baseline_takes_as_many_steps_in_each_stage(
    training: dict[str, Any], adversarial: dict[str, Any], epochs: tuple[int, int]
) -> None:
    """The adversarial stage never trains the backbone alone."""
    values = {"training": {"epochs": 12, **training}, "adversarial": {"epochs": 12, **adversarial}}
    baseline = parse(RunConfig, values).baseline()
    assert (baseline.training.epochs, baseline.adversarial.epochs) == epochs


def test_the_baseline_has_the_same_patience_in_steps() -> None:
    training = {"early_stop_patience": 7, "schedule": {"name": "plateau", "patience": 3}}
    for interval, patience in ((1, (14, 6)), (2, (10, 4))):
        steps = {"second_pass_interval": interval, "restoration_start": 0}
        run = parse(RunConfig, {"training": {**training, **steps}})
        baseline = run.baseline()
        assert (baseline.training.early_stop_patience, baseline.training.schedule.patience) == patience
    assert parse(RunConfig, {"training": {"early_stop_patience": None}}).baseline().training.early_stop_patience is None


def test_the_baseline_model_differs_in_the_defence_only() -> None:
    for activation in ("elu", "keep"):
        values = {"backbone": "resnet18", "small_stem": True, "dropout": 0.5, "activation": activation}
        model = parse(ModelConfig, values)
        baseline = model.baseline()
        assert (baseline.defence, baseline.activation) == ("none", "keep")
        assert baseline.model_copy(update={"defence": "fpd", "activation": activation}) == model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evaluation": {"eps": []}}, "evaluation: eps must hold at least one radius"),
        ({"evaluation": {"eps": [-0.1]}}, "evaluation: eps must be 0 or a positive number, found -0.1"),
        ({"evaluation": {"eps": [2]}}, "evaluation: eps must be at most 1 in linf .*8/255 is eight grey levels"),
        ({"adversarial": {"eps": 8}}, "adversarial: eps must be at most 1 in linf"),
        ({"training": {"noise": float("inf")}}, "training.noise: .* finite"),
        ({"training": {"optimizer": {"lr": float("nan")}}}, "training.optimizer.lr: .* finite"),
    ],
)
def test_invalid_numbers_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(RunConfig, values)


def test_radii_beyond_one_are_fine_in_l2() -> None:
    assert parse(RunConfig, {"evaluation": {"norm": "l2", "eps": [2]}}).evaluation.eps == (2.0,)
