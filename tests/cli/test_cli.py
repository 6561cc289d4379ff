from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from robustfpd.cli import main
from robustfpd.config import RunConfig, load_run, recipe
from robustfpd.models import enhance

FAST = ["training.epochs=2", "data.train_limit=128", "model.pyramid_channels=8"]


def _fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr()[1]
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'"),
        (["train", "digit/mini"], "unknown recipe 'digit/mini'; did you mean 'digits/mini'"),
        (["train", "digits/mini", "data.dataset=digit"], "unknown dataset 'digit'; did you mean 'digits'"),
        (["train", "digits/mini", "model.backbone=resnet_18"], "unknown backbone 'resnet_18'; did you mean"),
        (
            ["train", "digits/mini", "training.epoch=3"],
            "unknown field 'training.epoch'; did you mean 'training.epochs'",
        ),
        (["train", "digits/mini", "training.epochs=zero"], "training.epochs: .* found 'zero'"),
        (["train", "digits/mini", "model.head=tahn"], "model.head: .* found 'tahn'"),
        (["train", "digits/mini", "nonsense"], "'nonsense' is not of the form field=value"),
        (
            ["train", "digits/mini", "model.backbone=resnet18.nosuchtag"],
            "backbone 'resnet18.nosuchtag' cannot be built",
        ),
        (["train", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["train", "digits/../digits/mini"], "unknown recipe"),
        (["train", "digits/mini", "--device", "cdua"], "unknown device 'cdua'; did you mean 'cuda'"),
        (["train", "digits/mini", "--device", "cuda:x"], "device takes .* found 'cuda:x'"),
        (["train", "digits/mini", "--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["train", "digits/mini", "model.backbone=nonets:make"], "nonets cannot be imported from here"),
        (["train", "folder/mini"], "no folder .*data; give the one that holds a folder of images per class"),
        (["train", "digits/mini", "evaluation.suite=quik"], "unknown suite 'quik'; did you mean 'quick'"),
        (["train", "digits/mini", "--out", "/proc/run"], "/proc/run"),
        (["evaluate", "runs/nowhere"], "no run, model or evaluation 'runs/nowhere'"),
    ],
)
def test_errors_are_one_line_with_the_nearest_choices(
    arguments: list[str],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(expected, _fails(capsys, *arguments))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "digits/mini", "--protocol", "publishd"], "invalid choice 'publishd' for argument '--protocol'"),
        (["train", "digits/mini", "--protocl", "published"], r"(?s)Unrecognized options: --protocl.*--protocol \{"),
        (["train", "digits/mini", "--seed", "x"], "Error parsing --seed"),
        (["train"], r"(?s)Missing from robustfpd train:.*RECIPE"),
        (["predict", "--top", "3"], r"(?s)Missing from robustfpd predict:.*RUN"),
        (["evaluate", "x", "--suite", "slow"], "invalid choice 'slow' for argument '--suite'"),
        (["evaluate", "x", "--norm", "l3"], "invalid choice 'l3' for argument '--norm'"),
    ],
)
def test_wrong_arguments_are_reported_by_tyro(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert re.search(expected, capsys.readouterr()[1])


def test_missing_data_is_reported_with_its_folder_and_download(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    error = _fails(capsys, "train", "mnist/mini", "--data-root", str(tmp_path))
    assert str(tmp_path / "MNIST" / "raw") in error
    assert "--download" in error


def test_evaluations_of_a_run_are_kept_beside_each_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(run), "--eps", "0.01", "0.3", "--num-images", "40", "--suite", "first-look"])
    first = run / "evaluation" / "digits-first-look-linf.json"
    record = json.loads(first.read_text())
    assert [w["eps"] for w in record["worst_case"]] == [0.01, 0.3]
    assert record["clean"]["total"] == 40
    before = first.read_bytes()
    main(["evaluate", str(run), "--eps", "8/255", "--num-images", "10", "--suite", "first-look"])
    assert first.read_bytes() == before
    assert (run / "evaluation" / "digits-first-look-linf-2.json").is_file()
    capsys.readouterr()
    main(["evaluate", str(run), "--eps", "0.1", "--num-images", "10", "--suite", "first-look", "--split", "validation"])
    assert "(validation images)" in " ".join(capsys.readouterr().out.split())
    held_out = json.loads((run / "evaluation" / "digits-validation-first-look-linf.json").read_text())
    assert (
        held_out["data_sha256"]
        != json.loads((run / "evaluation" / "digits-first-look-linf-2.json").read_text())["data_sha256"]
    )
    assert "--num-images must be at least 1" in _fails(capsys, "evaluate", str(run), "--num-images", "0")
    assert "at most 1 in linf (pixels lie in [0, 1]), found 8" in _fails(capsys, "evaluate", str(run), "--eps", "8")
    assert "eps must hold numbers such as 0.03 or 8/255" in _fails(capsys, "evaluate", str(run), "--eps", "8/x")
    assert "give --eps in l2" in _fails(capsys, "evaluate", str(run), "--norm", "l2")
    assert "unknown dataset 'mnis'" in _fails(capsys, "evaluate", str(run), "--dataset", "mnis")


def test_settings_among_the_flags_are_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    first, *others = FAST
    main(
        [
            "train",
            "digits/mini",
            first,
            "--baseline",
            *others,
            "--out",
            str(run),
            "training.noise=0.25",
            "training.restoration_start=0",
            "training.second_pass_interval=2",
        ]
    )
    assert f"robustfpd evaluate {run}" in capsys.readouterr().out
    settings = load_run(run / "config.yaml")
    assert settings.training.noise == 0.25
    assert settings.data.train_limit == 128
    assert settings.model.defence == "none"
    config = json.loads((run / "checkpoints" / "best" / "config.json").read_text())
    assert config["model"]["defence"] == "none"
    rows = (run / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 3  # one and a half steps a batch, in two epochs


def test_a_saved_model_needs_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    enhance("resnet_mini", num_classes=10, in_channels=1, image_size=8, pyramid_channels=4).save(tmp_path / "model")
    assert "name its test images with --dataset" in _fails(capsys, "evaluate", str(tmp_path / "model"))
    main(["evaluate", str(tmp_path / "model"), "--dataset", "digits", "--num-images", "4", "--suite", "first-look"])
    assert " 4 images" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"model.safetensors", "config.json"}
    assert (tmp_path / "model-evaluation" / "digits-first-look-linf.json").is_file()


def _dies_of_interrupts() -> None:
    """A process started by a background job of a shell would ignore Ctrl-C, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_leaves_a_complete_checkpoint_and_prints_how_to_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["training.epochs=4000", *FAST[1:]]
    command = [sys.executable, "-m", "robustfpd", "train", "digits/mini", *settings, "--out", str(run)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=_dies_of_interrupts,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "last").is_dir() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=60)
    assert process.returncode == 130, (out, error)
    assert "Traceback" not in error
    assert "--resume" in out
    assert re.search(r"\d+ complete epochs? (is|are) kept", out)
    from robustfpd.models import load

    assert load(run / "checkpoints" / "last").config.backbone == "resnet_mini"


def test_an_interrupt_during_a_librarys_evaluated_source_still_ends_with_130(tmp_path: Path) -> None:
    """CPython would end `python -m` by signal then, though the interrupt was handled."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, robustfpd.cli.demo as commands\n"
        "def interrupted() -> None:\n"
        "    exec('raise KeyboardInterrupt')\n"
        "commands.demo = interrupted\n"
    )
    source = Path(__file__).parents[2] / "src"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"}
    command = [sys.executable, "-m", "robustfpd", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted")


def test_demo_compares_the_three_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(name: str, overrides: Sequence[str]) -> RunConfig:
        return recipe(name, [*overrides, *FAST[1:], "evaluation.num_images=10", "evaluation.eps=[0.1]"])

    monkeypatch.setattr("robustfpd.cli.demo.recipe", small)
    out = tmp_path / "demo"
    main(["demo", "--epochs", "1", "--out", str(out)])
    printed = capsys.readouterr().out
    page = (out / "report.html").read_text()
    for name in ("FPD", "undefended baseline, same noise", "undefended baseline, no noise"):
        assert name in page
        assert name.split(",")[0] in printed
    assert "try next" in printed
    for step in re.findall(r"robustfpd \w+", printed.partition("try next")[2]):
        assert step.split()[1] in ("train", "evaluate", "recipes")
    (out / "notes.txt").write_text("mine")
    assert "training.epochs" in _fails(capsys, "demo", "--epochs", "0", "--out", str(out))
    assert (out / "report.html").read_text() == page
    assert (out / "notes.txt").read_text() == "mine"


def test_demo_refuses_a_folder_that_holds_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    assert "holds something other than a demo" in _fails(capsys, "demo", "--out", str(tmp_path))
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_recipes_lists_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    from robustfpd.config import recipe_names

    main(["recipes"])
    out = capsys.readouterr().out
    assert all(name in out for name in recipe_names())
