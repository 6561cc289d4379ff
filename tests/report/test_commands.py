from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import pytest

from robustfpd.config import RunConfig, parse, recipe, recipe_names
from robustfpd.errors import InputError
from robustfpd.report.sources import evaluation_command, training_command

if TYPE_CHECKING:
    from tests.report.conftest import MakeRecord


def settings(command: str) -> list[str]:
    return [word for word in shlex.split(command)[3:] if "=" in word]


def adversarial(run: RunConfig) -> RunConfig:
    return run.model_copy(update={"stage": "adversarial"})


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_as_it_is_needs_no_settings(name: str) -> None:
    for run in (recipe(name), recipe(name).baseline()):
        assert settings(training_command(run, "runs/x")) == []


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        [], ["training.epochs=3"], ["training.noise=0.1", "model.head=spectral", "seed=4"],
        ["training.optimizer.lr=1e-5", "data.train_limit=64", "data.augment.flip=true"],
        ["training.second_pass=joint", "training.epochs=36"],
        ["training.early_stop_patience=7", "training.schedule={name: plateau, patience: 3}"],
        ["adversarial.epochs=2", "adversarial.eps=0.3", "model.denoise_after=[0]", "model.stages=[act1, layer1]"],
    ],
)  # fmt: skip
def test_the_settings_lead_back_to_the_run(overrides: list[str], baseline: bool) -> None:
    run = recipe("digits/mini", overrides)
    run = run.baseline() if baseline else run
    command = training_command(run, "runs/x")
    words = shlex.split(command)
    assert ("--baseline" in words) is baseline
    seed = [f"seed={words[words.index('--seed') + 1]}"] if "--seed" in words else []
    again = recipe("digits/mini", [*settings(command), *seed])
    assert (again.baseline() if baseline else again) == run


def test_settings_without_overrides_are_an_error() -> None:
    for interval, epochs, nearest, gives in ((1, 3, 2, 4), (2, 5, 3, 4)):
        steps = [f"training.second_pass_interval={interval}", "training.restoration_start=0"]
        run = recipe("digits/mini", steps).baseline()
        odd = run.model_copy(update={"training": run.training.model_copy(update={"epochs": epochs})})
        with pytest.raises(InputError, match=rf"epochs is {epochs}, .*training\.epochs={nearest}.* gives {gives}"):
            training_command(odd, "runs/x")
    with pytest.raises(InputError, match=r"recipe 'mine\.yaml' is not a packaged one"):
        training_command(run.model_copy(update={"recipe": "mine.yaml"}), "runs/x")


def test_stages_and_folders_become_flags() -> None:
    run = adversarial(recipe("mnist/mini"))
    flags = "--stages two-phase,adversarial --data-root data --download --out runs/x"
    assert training_command(run, "runs/x") == f"robustfpd train mnist/mini {flags}"
    elsewhere = {"root": "/somewhere/else", "cache": "/cache", "download": True}
    moved = run.model_copy(update={"data": run.data.model_copy(update=elsewhere)})
    assert training_command(moved, "runs/x") == training_command(run, "runs/x")
    scratch = run.model_copy(update={"adversarial": run.adversarial.model_copy(update={"start": "scratch"})})
    assert "adversarial.start=scratch --stages adversarial" in training_command(scratch, "runs/x")
    assert "--data-root" not in training_command(recipe("digits/mini"), "runs/x")


def test_the_published_protocol_is_named() -> None:
    published = []
    for name in recipe_names():
        try:
            published.append(recipe(name, protocol="published"))
        except InputError:
            continue
    for run in published:
        command = training_command(run, "runs/x")
        assert "--protocol published" in command
        assert settings(command) == []


def test_an_evaluation_command_names_every_option(make_record: MakeRecord) -> None:
    record = make_record("x")
    first = record.worst_case[0].model_copy(update={"eps": 8 / 255})
    record = record.model_copy(update={"worst_case": (first, *record.worst_case[1:])})
    digits = evaluation_command(record, parse(RunConfig, {"seed": 7}), "digits/x")
    assert digits == (
        "robustfpd evaluate digits/x --suite quick --norm linf --eps 8/255 0.2 --num-images 200 --every-attack"
    )
    mnist = evaluation_command(record, recipe("mnist/mini"), "mnist/x")
    assert mnist.endswith("--seed 7 --data-root data")


@pytest.mark.parametrize(("backbone", "trust"), [("mynets:make", True), ("torchvision.models:resnet18", False)])
def test_own_networks_are_evaluated_with_trust_code(make_record: MakeRecord, backbone: str, trust: bool) -> None:
    config = recipe("folder/mini", [f"model.backbone={backbone}"])
    assert ("--trust-code" in shlex.split(evaluation_command(make_record("x"), config, "runs/x"))) is trust
