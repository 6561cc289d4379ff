"""The networks in models/ agree with the manifest; models/add.py adds them."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import robustfpd as rf
from robustfpd.cli import parse
from robustfpd.config import load_run, recipe
from robustfpd.errors import InputError, MissingDataError
from robustfpd.evaluation import EvaluationRecord
from robustfpd.models import zoo
from robustfpd.provenance import weights_sha256

ROOT = Path(__file__).parents[1]
SMALL = ["model.pyramid_channels=4", "model.head=tanh", "training.epochs=2", "adversarial.epochs=2"]
Add = Callable[..., None]
MakeRun = Callable[..., Path]


def check(folder: Path, name: str, model: zoo.ZooModel) -> None:
    """Check a network in models/ against its manifest entry and its card."""
    home = folder / name
    assert {p.relative_to(folder).as_posix() for p in home.rglob("*") if p.is_file()} == {f.path for f in model.files}
    for file in model.files:
        assert zoo.digest(folder / file.path) == file.sha256, file.path
        assert (folder / file.path).stat().st_size == file.size <= 5_000_000
    loaded = rf.load(home)
    config = load_run(home / "config.yaml")
    assert config.model == loaded.config
    assert (config.recipe, config.data.dataset, config.model.defence) == (model.recipe, model.dataset, model.defence)
    assert (config.data.root, config.data.cache) == ("data", None)
    card = (home / "README.md").read_text()
    assert f"\n---\n\n# {name}\n\n{model.description}\n" in card
    assert "license: mit" in card.split("---")[1]
    assert f'rf.load("{name}")' in card
    assert f"{sum(p.numel() for p in loaded.parameters()):,}" in card
    assert model.file("model.safetensors").sha256 in card
    assert "MIT" in card
    assert model.results
    for path in model.results:
        record = EvaluationRecord.load(folder / path)
        assert record.weights_sha256 == weights_sha256(loaded.classifier())
        assert record.model_name == name
        assert f"| 0 (clean) | {record.clean} |" in card
        assert f"{record.num_images:,} test images" in card
        for worst in record.worst_case:
            assert f"| {worst.eps:.4g} | {worst.robust} |" in card
        for attack in record.attacks:
            assert f"{attack.misclassified} / {attack.attacked}" in card
    texts = [(folder / f.path).read_text() for f in model.files if not f.path.endswith(".safetensors")]
    assert not any(str(part) in text for text in texts for part in (ROOT.parent, Path.home() / "x"))


def test_the_checkouts_networks_are_those_of_the_manifest() -> None:
    known = zoo.manifest().models
    for name, model in known.items():
        check(ROOT / "models", name, model)
        assert zoo.find(name) == ROOT / "models" / name
    weights = (ROOT / "models").glob("*/*/model.safetensors")
    assert {path.parent.relative_to(ROOT / "models").as_posix() for path in weights} == known.keys()


def test_the_readmes_table_has_the_committed_records(models_script: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text()
    between = readme.partition(models_script.BEGIN)[2].partition(models_script.END)[0]
    assert between.strip() == models_script.table()
    for name, model in zoo.manifest().models.items():
        record = EvaluationRecord.load(ROOT / "models" / model.results[0])
        line = next(line for line in between.splitlines() if f"`{name}`" in line)
        assert all(str(worst.robust) in line for worst in record.under_attack)


def test_adding_a_network_writes_the_readmes_table(plain_run: Path, add: Add, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "before\n<!-- measured: models/add.py -->\nold\n<!-- end of networks -->\nafter\n"
    )
    add(plain_run, "digits/mini-baseline")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("<!-- end of networks -->\nafter\n")
    assert "old" not in text
    assert "| `digits/mini-baseline` | noise" in text


@pytest.fixture(scope="module")
def run(fpd_run: Path, make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An FPD's run with its adversarial stage."""
    folder = tmp_path_factory.mktemp("runs") / "digits-mini"
    shutil.copytree(fpd_run, folder)
    config = load_run(folder / "config.yaml").model_copy(update={"stage": "adversarial"})
    make_run(folder / "adversarial", config, seed=1)
    return folder


@pytest.fixture
def plain_run(baseline_run: Path, tmp_path: Path) -> Path:
    """The undefended baseline's run, for a test to change."""
    return shutil.copytree(baseline_run, tmp_path / "plain")


@pytest.fixture
def add(add_model: Add, tmp_path: Path) -> Add:
    """`add` with a folder and a manifest of its own."""

    def into(run: Path, name: str, *records: Path, description: str = "Tiny", **options: Any) -> None:
        record = records or (run / "evaluation" / "first.json",)
        places = {"folder": tmp_path / "models", "manifest": tmp_path / "manifest.json"}
        add_model(run, name, description=description, record=record, **places, **options)

    return into


def entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, zoo.ZooModel]:
    monkeypatch.setattr(zoo, "MANIFEST", tmp_path / "manifest.json")
    monkeypatch.setattr(zoo, "checkout", lambda: tmp_path / "models")
    return zoo.manifest().models


def test_an_added_network_agrees_with_manifest_and_card(
    add: Add, run: Path, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(run, "digits/mini-fpd")
    add(run / "adversarial", "digits/mini-fpd-adversarial")
    add(plain_run, "digits/mini-baseline")
    add(run, "digits/mini-fpd", description="Anew")
    known = entered(tmp_path, monkeypatch)
    assert list(known) == ["digits/mini-baseline", "digits/mini-fpd", "digits/mini-fpd-adversarial"]
    for name, model in known.items():
        check(tmp_path / "models", name, model)
        assert isinstance(rf.load(name), rf.Baseline if "baseline" in name else rf.FPD)
        assert not any(part in json.dumps(model.model_dump()) for part in ("/machine", str(tmp_path)))
    assert [m.training for m in known.values()] == ["noise 0.2", "two-phase, noise 0.2", "adversarial, eps 0.1"]
    assert known["digits/mini-fpd"].description == "Anew"


def test_the_card_lists_cost_and_commands(add: Add, run: Path, tmp_path: Path) -> None:
    add(run / "adversarial", "digits/mini-fpd-adversarial")
    card = (tmp_path / "models" / "digits" / "mini-fpd-adversarial" / "README.md").read_text()
    assert f"robustfpd train digits/mini {' '.join(SMALL)} --stages two-phase,adversarial --out runs/" in card
    evaluation = "--suite first-look --norm linf --eps 8/255 0.05 --num-images 20"
    assert f"robustfpd evaluate runs/digits-mini-fpd-adversarial/adversarial {evaluation}\n" in card
    assert f"robustfpd evaluate digits/mini-fpd-adversarial {evaluation}\n" in card
    for row in ("| two-phase | 2 | 121 s | cpu | ", "| adversarial | 2 | 121 s | cpu | "):
        assert row in card
    for words in ("upper bound", "seed 0", "digits only", "pixels in [0, 1]", "CC BY 4.0", "PGD-40, pre-squash"):
        assert words in card


def test_the_cards_commands_are_understood(add: Add, plain_run: Path, tmp_path: Path) -> None:
    add(plain_run, "digits/mini-baseline")
    card = (tmp_path / "models" / "digits" / "mini-baseline" / "README.md").read_text()
    lines = [line for line in card.splitlines() if line.startswith("robustfpd ")]
    assert "robustfpd train digits/mini --baseline --out runs/digits-mini-baseline" in lines
    assert len(lines) == 3
    for line in lines:
        parse(shlex.split(line)[1:])


def _rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"weights_sha256": "0" * 64}, "is not about the weights in .*, found 0000.*run robustfpd evaluate"),
        ({"weights_sha256": None}, "is not about the weights in .*, found none"),
        ({"model_name": "runs/x (validation images)"}, "is about validation images"),
        (
            {"environment": {"note": "seen in /machine/of/mine"}},
            "would hold a path of this machine, '/machine/of/mine'",
        ),
        ({"environment": {"note": "C:\\Users\\me"}}, "would hold a path of this machine"),
    ],
)
def test_records_of_other_weights_or_with_machine_paths_are_refused(
    add: Add, plain_run: Path, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    _rewrite(plain_run / "evaluation" / "first.json", **changes)
    with pytest.raises(InputError, match=expected):
        add(plain_run, "digits/mini-baseline")
    assert not (tmp_path / "models" / "digits" / "mini-baseline").exists()
    assert not (tmp_path / "manifest.json").exists()


def test_records_of_other_weights_and_other_images_are_refused(add: Add, run: Path, plain_run: Path) -> None:
    with pytest.raises(InputError, match="is not about the weights"):
        add(run, "digits/mini-fpd", run / "adversarial" / "evaluation" / "first.json")
    _rewrite(plain_run / "environment.json", data={"test": {"images": 20, "sha256": "0" * 64}})
    with pytest.raises(InputError, match="other images than the run's test set"):
        add(plain_run, "digits/mini-baseline")


@pytest.mark.parametrize(
    "name", ["mini-baseline", "mnist/mini-baseline", "digits/../x", "digits/", "digits/Mini", "digits/a/b", "/digits/x"]
)
def test_names_that_do_not_fit_are_refused(add: Add, plain_run: Path, name: str) -> None:
    with pytest.raises(InputError, match="NAME must be digits/"):
        add(plain_run, name)


def test_unfit_descriptions_and_names_are_refused(add: Add, plain_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--description must be one line"):
        add(plain_run, "digits/x", description="two\nlines")
    shutil.copy(plain_run / "evaluation" / "first.json", tmp_path / "first.json")
    with pytest.raises(InputError, match="different names"):
        add(plain_run, "digits/x", plain_run / "evaluation" / "first.json", tmp_path / "first.json")
    with pytest.raises(InputError, match="path of this machine"):
        add(plain_run, "digits/x", description=f"From {tmp_path}/runs")
    recipe("digits/mini").baseline().model_copy(update={"recipe": "mine.yaml"}).save(plain_run / "config.yaml")
    with pytest.raises(InputError, match="not a packaged one"):
        add(plain_run, "digits/x")


def test_missing_files_are_named(add: Add, plain_run: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="no run in"):
        add(tmp_path / "nowhere", "digits/x")
    alone = shutil.copytree(run / "adversarial", tmp_path / "alone" / "adversarial")
    with pytest.raises(MissingDataError, match="no run in"):
        add(alone, "digits/x")
    shutil.copytree(plain_run, tmp_path / "alone", dirs_exist_ok=True)
    with pytest.raises(InputError, match="does not continue"):
        add(alone, "digits/x")
    (plain_run / "metrics.csv").unlink()
    with pytest.raises(MissingDataError, match=r"no metrics\.csv"):
        add(plain_run, "digits/x")
    shutil.rmtree(plain_run / "checkpoints")
    with pytest.raises(MissingDataError, match="checkpoints/best"):
        add(plain_run, "digits/x")


def test_weights_over_five_megabytes_are_refused(add: Add, plain_run: Path) -> None:
    with (plain_run / "checkpoints" / "best" / "model.safetensors").open("ab") as file:
        file.truncate(5_000_001)
    with pytest.raises(InputError, match=r"has 5,000,001 bytes; models/ takes networks of up to 5,000,000"):
        add(plain_run, "digits/x")


def test_a_large_ledger_is_left_out(
    add: Add, plain_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "models" / "digits" / "mini-baseline" / "results"
    add(plain_run, "digits/mini-baseline")
    assert {p.name for p in results.iterdir()} == {"first.json", "first.ledger.csv"}
    assert "left out" not in capsys.readouterr().out
    ledger = plain_run / "evaluation" / "first.ledger.csv"
    heading, *rows = ledger.read_text().splitlines()
    ledger.write_text("\n".join([heading, *rows * (200_000 // len("\n".join(rows)) + 1)]))
    add(plain_run, "digits/mini-baseline")
    assert {p.name for p in results.iterdir()} == {"first.json"}
    assert "left out: the ledger of first" in capsys.readouterr().out
    assert "ledger" not in (results.parent / "README.md").read_text()


def test_an_earlier_network_stays_when_the_new_one_is_refused(
    add: Add, plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(plain_run, "digits/mini-baseline")
    before = (tmp_path / "manifest.json").read_text()
    _rewrite(plain_run / "evaluation" / "first.json", weights_sha256="0" * 64)
    with pytest.raises(InputError):
        add(plain_run, "digits/mini-baseline")
    assert (tmp_path / "manifest.json").read_text() == before
    known = entered(tmp_path, monkeypatch)
    check(tmp_path / "models", "digits/mini-baseline", known["digits/mini-baseline"])


def test_the_settings_that_go_along_name_no_folder(add: Add, run: Path, tmp_path: Path) -> None:
    add(run, "digits/mini-fpd")
    settings = yaml.safe_load((tmp_path / "models" / "digits" / "mini-fpd" / "config.yaml").read_text())
    assert settings["data"]["root"] == "data"
    assert settings["training"]["epochs"] == 2


def test_refresh_writes_cards_and_manifest_again(
    add: Add, add_model: Add, plain_run: Path, tmp_path: Path
) -> None:  # fmt: skip
    add(plain_run, "digits/mini-baseline")
    manifest, home = tmp_path / "manifest.json", tmp_path / "models" / "digits" / "mini-baseline"
    card, entries = (home / "README.md").read_text(), manifest.read_text()
    (home / "README.md").write_text("outdated")
    refresh = add_model.__globals__["refresh"]
    refresh(tmp_path / "models", manifest)
    assert (home / "README.md").read_text() == card
    assert manifest.read_text() == entries
