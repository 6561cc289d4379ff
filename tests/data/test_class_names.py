from __future__ import annotations

from pathlib import Path

import pytest

from robustfpd.config import DataConfig
from robustfpd.data.datasets import class_names


def folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


def test_described_data_sets_have_names() -> None:
    assert class_names(DataConfig(), 10) == tuple("0123456789")
    with_background = class_names(DataConfig(dataset="caltech101", background=True), 102)
    assert with_background[:2] == ("BACKGROUND_Google", "Faces")
    assert class_names(DataConfig(dataset="caltech101"), 101)[0] == "Faces"


@pytest.mark.parametrize("below", ["", "train"])
def test_folders_are_named_by_themselves(tmp_path: Path, below: str) -> None:
    folders(tmp_path / below, "cat", "dog", ".cache")
    config = DataConfig(dataset="folder", root=str(tmp_path))
    assert class_names(config, 2) == ("cat", "dog")
    assert class_names(config, 3) == ()  # another folder by now


def test_folders_that_are_gone_name_nothing(tmp_path: Path) -> None:
    assert class_names(DataConfig(dataset="folder", root=str(tmp_path / "gone")), 2) == ()


def test_caltech256_loses_its_numbers(tmp_path: Path) -> None:
    folders(tmp_path / "caltech256" / "256_ObjectCategories", *(f"{i:03}.thing{i}" for i in range(1, 258)))
    config = DataConfig(dataset="caltech256", root=str(tmp_path))
    assert class_names(config, 256)[-1] == "thing256"
    assert class_names(config, 257)[-1] == "thing257"
