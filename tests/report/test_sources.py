from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from robustfpd.config import RunConfig
from robustfpd.errors import InputError
from robustfpd.report.html import render
from robustfpd.report.page import report_on
from robustfpd.report.sources import Source, read


@pytest.fixture
def run(measured: Path, tmp_path: Path) -> Path:
    """A run's folder with a real evaluation; its training left settings and three epochs."""
    folder = tmp_path / "runs" / "mine"
    shutil.copytree(measured, folder / "evaluation")
    RunConfig(recipe="digits/mini").save(folder / "config.yaml")
    columns = (
        "epoch,ce,restoration,second_ce,second_restoration,adversarial_ce,gate_open,train_accuracy,"
        "train_adversarial_accuracy,validation_accuracy,validation_robust_accuracy,validation_ce,"
        "validation_restoration,lr,images_per_second,seconds"
    )
    rows = [f"{i},1,0.1,1,0.1,,1,0.5,,{0.5 + i / 10},,1,0.1,0.001,100,1" for i in range(3)]
    (folder / "metrics.csv").write_text("\n".join([columns, *rows]) + "\n")
    (folder / "environment.json").write_text(json.dumps({"command": "robustfpd train digits/mini"}))
    return folder


def _page(source: Source) -> str:
    """The page, which is made also where files are missing."""
    return render(report_on([source]))


def test_metrics_of_this_version_hold_the_batch_in_which_the_gate_opened(run: Path) -> None:
    lines = (run / "metrics.csv").read_text().splitlines()
    rows = [f"{line},{opened}" for line, opened in zip(lines, ("gate_opened", "", "7", "1"), strict=True)]
    (run / "metrics.csv").write_text("\n".join(rows) + "\n")
    source = read(run)
    assert source.problems == ()
    assert [m.gate_opened for m in source.history] == [None, 7, 1]


def test_metrics_of_an_earlier_version_are_read(run: Path) -> None:
    assert "gate_opened" not in (run / "metrics.csv").read_text()
    assert [m.gate_opened for m in read(run).history] == [None] * 3


def test_a_complete_run_has_no_problems(run: Path) -> None:
    source = read(run)
    assert source.problems == ()
    assert [m.validation_accuracy for m in source.history] == [0.5, 0.6, 0.7]
    assert source.config == RunConfig(recipe="digits/mini")
    (evaluation,) = source.evaluations
    assert evaluation.problems == ()
    assert evaluation.record.ledger
    assert evaluation.gallery is not None
    assert source.home == run
    assert "Missing results" not in _page(source)


@pytest.mark.parametrize("given", ["folder", "record"])
def test_evaluations_of_own_modules_are_read_from_their_folder(measured: Path, given: str) -> None:
    source = read(measured if given == "folder" else measured / "record.json")
    assert len(source.evaluations) == 1
    assert source.problems == ()


def test_networks_that_come_with_robustfpd_have_their_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = read("digits/mini-fpd")
    assert source.evaluations
    assert source.config is not None
    assert source.home == Path("runs") / "digits-mini-fpd-evaluation"
    page = _page(source)
    assert "trusted" in page


def test_a_saved_model_has_its_evaluations_beside_it(measured: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    shutil.copytree(measured, tmp_path / "model-evaluation")
    assert len(read(tmp_path / "model").evaluations) == 1


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits-mini").mkdir(parents=True)
    RunConfig().save(tmp_path / "runs" / "digits-mini" / "config.yaml")
    with pytest.raises(InputError, match="did you mean 'runs/digits-mini'"):
        read("runs/digits-mni")
    with pytest.raises(InputError, match="'digits/mini-fpd'"):
        read("digits/mini-fdp")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no run, model or evaluation in .*photos"):
        read(tmp_path / "photos")


def _no_evaluation(run: Path) -> None:
    shutil.rmtree(run / "evaluation")


def _half_a_ledger(run: Path) -> None:
    path = run / "evaluation" / "record.ledger.csv"
    path.write_bytes(path.read_bytes()[:-37])


def _no_ledger(run: Path) -> None:
    (run / "evaluation" / "record.ledger.csv").unlink()


def _unfinished(run: Path) -> None:
    (run / "evaluation" / "record.json").unlink()
    (run / "evaluation" / "record.unfinished.json").write_text("{}")


def _partial(run: Path) -> None:
    path = run / "evaluation" / "record.json"
    values = json.loads(path.read_text())
    evidence = "the evaluation ended after its limit of 5 minutes"
    values["verdict"]["checks"].append({"name": "complete", "outcome": "suspicious", "evidence": evidence})
    values["attacks"][-1]["not_attacked"] = 7
    path.write_text(json.dumps({**values, "complete": False}))
    (run / "evaluation" / "record.unfinished.json").write_text("{}")


def _no_record(run: Path) -> None:
    (run / "evaluation" / "record.json").unlink()


def _newer(run: Path) -> None:
    path = run / "evaluation" / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))


def _damaged(run: Path) -> None:
    path = run / "evaluation" / "record.json"
    path.write_text(path.read_text()[:200])


def _no_picture(run: Path) -> None:
    next((run / "evaluation" / "record.gallery").glob("*-adversarial.png")).unlink()


def _bad_picture(run: Path) -> None:
    next((run / "evaluation" / "record.gallery").glob("*-clean.png")).write_bytes(b"no picture")


def _no_pictures(run: Path) -> None:
    (run / "evaluation" / "record.gallery" / "gallery.json").write_text("{")


def _no_metrics(run: Path) -> None:
    (run / "metrics.csv").unlink()


def _half_metrics(run: Path) -> None:
    path = run / "metrics.csv"
    path.write_text(path.read_text()[:-40])


def _no_settings(run: Path) -> None:
    (run / "config.yaml").write_text("model: [")


def _other_pictures(run: Path) -> None:
    path = run / "evaluation" / "record.gallery" / "gallery.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "settings_sha256": "0" * 64}))


def _bytes_in_metrics(run: Path) -> None:
    path = run / "metrics.csv"
    path.write_bytes(path.read_bytes() + b"\xff\xfe\x00,\n")


@pytest.mark.parametrize(
    ("damage", "problem", "shown"),
    [
        (_no_evaluation, "was not evaluated: run <code>robustfpd evaluate", "Validation accuracy and gate"),
        (_half_a_ledger, "record.ledger.csv is truncated or damaged: no confusion", "a small network"),
        (_no_record, "lost its record: so far ", "Validation accuracy and gate"),
        (_no_ledger, "record.ledger.csv is missing: no confusion", "a small network"),
        (_unfinished, "was not finished: so far ", "Validation accuracy and gate"),
        (_partial, "record is partial: the evaluation ended after its limit of 5 minutes", "an upper bound, because"),
        (_partial, "record is partial: ", "7 not attacked"),
        (_newer, "is not an evaluation record of format 3, found format 99", "Validation accuracy and gate"),
        (_damaged, "record.json cannot be read", "Validation accuracy and gate"),
        (_no_picture, "1 of the pictures in", "picture missing"),
        (_no_pictures, "no pictures: ", "Confusion matrix"),
        (_no_metrics, "metrics.csv is missing: no training curves", "a small network"),
        (_half_metrics, "metrics.csv is damaged after 2 epochs", "Validation accuracy and gate"),
        (_other_pictures, "are another evaluation's", "Confusion matrix"),
        (_bytes_in_metrics, "metrics.csv is damaged after 3 epochs", "Validation accuracy and gate"),
        (_no_settings, "settings: ", "a small network"),
    ],
)  # fmt: skip
def test_missing_files_are_listed_and_the_rest_is_shown(
    run: Path, damage: Callable[[Path], None], problem: str, shown: str
) -> None:
    damage(run)
    page = _page(read(run))
    assert "Missing results and limits" in page
    assert problem in page.replace("&#39;", "'")
    assert shown in page


def test_a_damaged_picture_is_left_blank(run: Path) -> None:
    _bad_picture(run)
    assert _page(read(run)).count('class="gone"') == 1


@pytest.mark.parametrize("kind", ["CMYK", "huge"])
def test_a_huge_picture_is_left_blank_and_cmyk_is_converted(run: Path, kind: str) -> None:
    from PIL import Image

    path = next((run / "evaluation" / "record.gallery").glob("*-clean.png"))
    Image.new("CMYK" if kind == "CMYK" else "1", (8, 8) if kind == "CMYK" else (20000, 20000)).save(
        path, "JPEG" if kind == "CMYK" else "PNG"
    )
    assert _page(read(run)).count('class="gone"') == (kind == "huge")


def test_other_json_files_are_not_read_as_records(run: Path) -> None:
    (run / "evaluation" / "notes.json").write_text('{"mine": 1}')
    (run / "evaluation" / "list.json").write_text("[1, 2]")
    assert read(run).problems == ()
    assert len(read(run).evaluations) == 1
