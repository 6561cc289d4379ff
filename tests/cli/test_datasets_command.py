from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from robustfpd.cli import main
from robustfpd.data import names
from robustfpd.data.datasets import inventory
from robustfpd.data.download import NOTE


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with a little of two data sets, and their decoded images in tmp_path/cache."""
    for number in range(1200):
        folder = tmp_path / "root" / "caltech101" / "101_ObjectCategories" / f"class-{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(b"x" * 1000)
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(b"x" * 2_000_000)
    (tmp_path / "cache" / "images").mkdir(parents=True)
    for name, count in (("caltech101-a.images", 3), ("caltech101-b.images", 4), ("caltech256-a.images", 5)):
        (tmp_path / "cache" / "images" / name).write_bytes(b"x" * count * 1_000_000)
    return tmp_path / "root"


def shown(capsys: pytest.CaptureFixture[str], root: Path) -> str:
    main(["datasets", "--data-root", str(root), "--cache", str(root.parent / "cache")])
    return capsys.readouterr().out


def row(text: str, name: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [name])


def test_every_data_set_has_a_row_within_eighty_columns(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capsys, root)
    table = text.split("looked in")[0]
    assert max(len(line) for line in table.splitlines()) <= 80
    assert "…" not in table
    assert row(text, "caltech101") == ["caltech101", "yes", "caltech101", "1,200", "3", "1.2", "MB", "7.0", "MB"]
    assert row(text, "caltech256") == ["caltech256", "no", "caltech256", "29,780", "256", "5.0", "MB"]
    assert row(text, "mnist") == ["mnist", "yes", "MNIST", "70,000", "10", "2.0", "MB"]
    assert row(text, "digits")[:2] == ["digits", "yes"]
    for name in names():
        assert row(text, name)


def test_what_is_missing_comes_with_the_command_that_fetches_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, root)
    assert f"looked in {root}" in text
    for name, size in (("svhn", "246 MB"), ("fashion_mnist", "31 MB"), ("caltech256", "1.2 GB")):
        (command,) = [line for line in text.splitlines() if f"train {name}/mini" in line]
        assert f"--data-root {root} --download" in command
        assert command.endswith(f"# {size}")
    assert "train mnist/mini" not in text
    assert "train caltech101/mini --data-root" not in text


def test_an_empty_root_is_shown_and_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, tmp_path / "nowhere")
    assert row(text, "mnist")[:2] == ["mnist", "no"]
    assert "train mnist/mini" in text
    assert not (tmp_path / "nowhere").exists()


def test_an_interrupted_download_is_not_there(root: Path) -> None:
    (root / "caltech101" / NOTE).touch()
    found = {each.info.name: each for each in inventory(root)}
    assert not found["caltech101"].there
    assert found["mnist"].there


def test_nothing_is_decoded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", None)
    assert {each.info.name: each.images for each in inventory(root)}["caltech101"] == 1200
