from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from robustfpd.cli import main
from robustfpd.config import recipe
from robustfpd.evaluation import EvaluationRecord
from robustfpd.models import zoo
from robustfpd.report.paths import resolve_network

NAME = "digits/mini-baseline-adversarial"


@pytest.fixture(scope="module")
def built(
    make_run: Callable[..., Path], add_model: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with models/ and a manifest: an FPD, and an undefended baseline after its adversarial stage."""
    root = tmp_path_factory.mktemp("shipped")
    fpd = recipe("digits/mini", ["model.pyramid_channels=4", "evaluation.num_images=12", "evaluation.suite=first-look"])
    plain = fpd.baseline()
    runs = {"digits/mini-fpd": make_run(root / "fpd", fpd)}
    make_run(root / "plain", plain)
    runs[NAME] = make_run(root / "plain" / "adversarial", plain.model_copy(update={"stage": "adversarial"}))
    for name, run in runs.items():
        add_model(
            run, name, description="Tiny", record=(run / "evaluation" / "first.json",), folder=root / "models",
            manifest=root / "manifest.json",
        )  # fmt: skip
    return root


@pytest.fixture
def places(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder; the networks lie in `models` in it, and the package takes it for the checkout."""
    shutil.copytree(built / "models", tmp_path / "models")
    monkeypatch.setattr(zoo, "MANIFEST", built / "manifest.json")
    monkeypatch.setattr(zoo, "checkout", lambda: tmp_path / "models")
    monkeypatch.setenv("ROBUSTFPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(zoo.VARIABLE, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(capsys: pytest.CaptureFixture[str]) -> str:
    main(["models"])
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 80
    return out


def test_the_table_fits_and_lists_what_was_measured(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = listed(capsys)
    for name in ("digits/mini-fpd", NAME):
        record = json.loads((places / "models" / name / "results" / "first.json").read_text())
        clean, robust = record["clean"], record["worst_case"][0]["robust"]
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        following = out.splitlines()[out.splitlines().index(line) + 1]
        assert f"clean       {100 * clean['count'] / clean['total']:.1f} [{100 * clean['low']:.1f}, " in line
        assert f"linf 0.0314 {100 * robust['count'] / robust['total']:.1f} [{100 * robust['low']:.1f}, " in following
        assert "kB, checkout" in following
        answers = EvaluationRecord.load(places / "models" / name / "results" / "first.json")
        assert f"robust?     {answers.robustness.level}" in out
        assert f"reliable?   {answers.verdict.status}" in out
        stages = json.loads((places / "models" / name / "training.json").read_text())["stages"]
        assert sum(stage["seconds"] for stage in stages) > 0
    assert "FPD" in out
    for words in ("two-phase", "noise 0.2", "no defence", "adversarial", "eps 0.1"):
        assert words in out
    assert f'rf.load("{NAME}")' in out
    training = places / "models" / NAME / "training.json"
    stages = json.loads(training.read_text())
    stages["stages"][-1]["seconds"] = 90 * 60 - sum(stage["seconds"] for stage in stages["stages"][:-1])
    training.write_text(json.dumps(stages))
    assert listed(capsys).count("trained in 90 min") == 1
    training.unlink()
    assert listed(capsys).count("trained in") == 1


def test_the_table_lists_where_a_network_is(
    places: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "checkout", lambda: None)
    out = listed(capsys)
    assert out.count("to be fetched") == 2
    assert out.count("not downloaded") == 2
    monkeypatch.setenv(zoo.VARIABLE, (places / "models").as_uri())
    zoo.find(NAME)
    out = listed(capsys)
    assert out.count("kB, cache") == 1
    assert out.count("to be fetched") == 1
    (zoo.cached() / NAME / "model.safetensors").write_bytes(b"half")
    assert "cache, damaged" in listed(capsys)


def test_results_that_are_not_those_measured_are_not_shown(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = places / "models" / NAME / "results" / "first.json"
    path.write_text(path.read_text().replace('"count": ', '"count":  '))
    assert listed(capsys).count("not downloaded") == 1
    path.unlink()
    assert listed(capsys).count("not downloaded") == 1


def test_evaluate_takes_a_name_and_leaves_the_networks_folder_alone(
    places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in (places / "models").rglob("*")}
    main(["evaluate", "digits/mini-fpd", "--eps", "0.05"])
    assert "digits/mini-fpd: 12 images, linf, suite first-look" in " ".join(capsys.readouterr().out.split())
    assert {p: p.stat().st_mtime_ns for p in (places / "models").rglob("*")} == before
    path = places / "runs" / "digits-mini-fpd-evaluation" / "digits-first-look-linf.json"
    assert json.loads(path.read_text())["model_name"] == "digits/mini-fpd"
    named, placed = resolve_network("digits/mini-fpd"), resolve_network("models/digits/mini-fpd")
    assert named.name == placed.name == "digits/mini-fpd"
    assert named.results == placed.results == path.relative_to(places).parent


def test_the_model_cards_command_repeats_its_evaluation(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = (places / "models" / NAME / "README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith(f"robustfpd evaluate {NAME}"))
    main(command.split()[1:])
    folder = places / "runs" / "digits-mini-baseline-adversarial-evaluation"
    again = json.loads((folder / "digits-first-look-linf.json").read_text())
    first = json.loads((places / "models" / NAME / "results" / "first.json").read_text())
    for key in ("clean", "worst_case", "data_sha256", "weights_sha256", "model_name", "suite", "norm", "seed"):
        assert again[key] == first[key], key


def test_evaluate_fetches_a_name(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "checkout", lambda: None)
    monkeypatch.setenv(zoo.VARIABLE, (places / "models").as_uri())
    main(["evaluate", NAME, "--eps", "0.05", "--num-images", "5"])
    assert (places / "runs" / "digits-mini-baseline-adversarial-evaluation").is_dir()
    assert not (zoo.cached() / NAME / "evaluation").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["digits/mini-fdp"], "did you mean 'digits/mini-fpd'"),
        (["../x"], "no run, model or evaluation"),
        (["digits/mini-fpd", "--norm", "l2"], "give --eps in l2"),
    ],
)
def test_evaluate_reports_errors_in_one_line(
    places: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", *arguments])
    error = capsys.readouterr()[1]
    assert exit_.value.code == 2
    assert expected in error
    assert len(error.strip().splitlines()) == 1


def test_evaluate_of_a_network_out_of_reach_says_what_to_do(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(places / "models")
    with pytest.raises(SystemExit):
        main(["evaluate", NAME])
    error = capsys.readouterr()[1]
    for part in (str(places / "models" / NAME), str(zoo.cached() / NAME), zoo.VARIABLE):
        assert part in error
