from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import robustfpd as rf
from robustfpd import data
from robustfpd.cli import main
from robustfpd.cli import predict as command
from robustfpd.config import DataConfig
from robustfpd.models import zoo

FPD, PLAIN = "digits/mini-fpd", "mnist/mini-baseline"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve test digits, enlarged exactly four times, as a/0.png, b/0.png, a/1.png, … in the order of the test set."""
    folder = tmp_path_factory.mktemp("pictures")
    images = data.load(DataConfig()).test.images
    for place in range(12):
        path = folder / "ab"[place % 2] / f"{place // 2}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(images[place, 0].numpy()).save(path)
    return folder


def ask(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> Any:
    """Return what it prints, parsed under --json."""
    try:
        main(["predict", *map(str, arguments)])
        found = 0
    except SystemExit as exit_:
        found = int(exit_.code or 0)
    printed = capsys.readouterr()
    assert found == code, printed[1]
    return json.loads(printed.out) if "--json" in arguments else printed.out if code < 2 else printed[1]


def test_it_says_what_the_network_says(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = ask(capsys, FPD, pictures, "--json", "--top", 2)
    model = rf.load(FPD)
    assert isinstance(model, rf.FPD)
    images = data.load(DataConfig()).test.floats()[0][:12]
    order = [*range(0, 12, 2), *range(1, 12, 2)]  # a/*, then b/*
    with torch.no_grad():
        logits, restored = model(images[order])
        likely = model.classifier(squash=False)(images[order]).softmax(dim=1)
    assert [row["index"] for row in result["images"]] == logits.argmax(dim=1).tolist()
    assert [row["class"] for row in result["images"]] == [str(i) for i in logits.argmax(dim=1).tolist()]
    assert [row["confidence"] for row in result["images"]] == pytest.approx(likely.amax(dim=1).tolist(), abs=1e-5)
    apart = 255 * (restored.clamp(0, 1) - images[order]).flatten(1)
    assert [row["change_rms"] for row in result["images"]] == pytest.approx(
        apart.square().mean(1).sqrt().tolist(), rel=1e-4
    )
    assert all(
        len(row["top"]) == 2 and row["top"][0]["confidence"] >= row["top"][1]["confidence"] for row in result["images"]
    )
    assert result["unreadable"] == 0
    assert result["model"] == FPD


def test_restored_images_are_written_and_overwrite_nothing(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = ask(capsys, FPD, pictures, "--json", "--restored", tmp_path / "new" / "restored")
    files = [Path(row["restored"]) for row in result["images"]]
    assert len(set(files)) == 12
    assert {f.name for f in files[:1] + files[6:7]} == {"0-restored.png", "0-restored-2.png"}
    images = data.load(DataConfig()).test.floats()[0][:12]
    with torch.no_grad():
        restored = rf.load(FPD)(images).restored.clamp(0, 1)
    for file, place in zip(files, [*range(0, 12, 2), *range(1, 12, 2)], strict=True):
        with Image.open(file) as picture:
            assert np.abs(np.asarray(picture).astype(float) - 255 * restored[place, 0].numpy()).max() <= 0.51


def test_images_stay_where_restored_ones_are_written_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "a-restored.png"):
        Image.new("L", (8, 8), 77).save(tmp_path / name)
    ask(capsys, FPD, tmp_path, "--restored", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a-restored-2.png", "a-restored-restored.png", "a-restored.png", "a.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "a-restored.png") as picture:
        assert np.asarray(picture).min() == np.asarray(picture).max() == 77


def test_rows_as_csv(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = ask(capsys, PLAIN, pictures, pictures / "gone.png", "--csv", "--top", 2, code=1)
    rows = list(csv.DictReader(io.StringIO(written)))
    assert len(rows) == 13
    assert float(rows[0]["confidence"]) >= float(rows[0]["confidence_2"])
    assert rows[0]["change_rms"] == ""  # a plain network
    assert rows[-1]["error"] == "no such file or folder"
    assert rows[-1]["class"] == ""


def test_bad_files_cost_their_own_row_only(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "BATCH", 2)  # bad ones at the edges of batches too
    good = [pictures / "a" / f"{i}.png" for i in range(3)]
    for name, content in (("cut", good[0].read_bytes()[:60]), ("empty", b""), ("text", b"hello")):
        (tmp_path / f"{name}.png").write_bytes(content)
    (tmp_path / "folder").mkdir()
    given = [tmp_path / "cut.png", good[0], tmp_path / "empty.png", tmp_path / "text.png", good[1], tmp_path / "folder",
             good[2], tmp_path / "*.gif"]  # fmt: skip
    result = ask(capsys, FPD, *given, "--json", code=1)
    assert [bool(row["error"]) for row in result["images"]] == [True, False, True, True, False, True, False, True]
    alone = ask(capsys, FPD, *good, "--json")
    assert [r["index"] for r in result["images"] if not r["error"]] == [r["index"] for r in alone["images"]]
    assert result["unreadable"] == 5
    table = ask(capsys, FPD, *given, code=1)
    assert "5 of 8 could not be read" in table
    assert "not an image" in table


def test_a_name_of_any_bytes_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / b"\xff[red].png".decode(errors="surrogateescape")
    Image.new("L", (8, 8)).save(path)
    result = ask(capsys, FPD, tmp_path, "--json")
    assert result["images"][0]["image"].endswith("�[red].png")
    assert "[red].png" in ask(capsys, FPD, tmp_path).replace("\n", "")


def test_names_of_classes_come_from_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(zoo.find(FPD), run)
    names = [f"digit {i}" for i in range(10)]
    (run / "environment.json").write_text(json.dumps({"data": {"class_names": names}}))
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    assert ask(capsys, run, tmp_path / "a.png", "--json")["images"][0]["class"].startswith("digit ")
    saved = tmp_path / "saved"
    rf.load(run).save(saved)
    assert "their names are unknown" in ask(capsys, saved, tmp_path / "a.png")


def test_nan_logits_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = rf.load(FPD)
    with torch.no_grad():
        model.head.linear.bias.fill_(torch.nan)  # type: ignore[operator]
    model.save(tmp_path / "nan")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    result = ask(capsys, tmp_path / "nan", tmp_path / "a.png", "--json", "--restored", tmp_path / "r", code=1)
    assert result["images"][0]["error"] == "the network's logits are NaN"
    assert result["images"][0]["restored"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FPD,), "name at least one image"),
        ((FPD, "a.png", "--csv", "--json"), "exclude each other"),
        ((FPD, "a.png", "--top", 0), "--top must be at least 1, found 0"),
        ((FPD, "a.png", "--restored", __file__), "is a file; give a folder"),
        ((PLAIN, "a.png", "--restored", "r"), "without restoration; leave out --restored"),
        (("digits/mini-fdp", "a.png"), "did you mean 'digits/mini-fpd'"),
        ((FPD, "a.png", "--device", "tpu"), "tpu"),
    ],
)
def test_refusals(arguments: tuple[Any, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["predict", *map(str, arguments)])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed[1]


def test_quiet_prints_nothing(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(capsys, FPD, pictures, "--quiet") == ""
    assert ask(capsys, FPD, pictures, "--quiet", "--csv") == ""
