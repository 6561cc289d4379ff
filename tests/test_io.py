from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from robustfpd.errors import InputError, MissingDataError
from robustfpd.io import (
    atomic_path,
    cache_folder,
    check_url,
    download,
    readable_folder,
    replace_folder,
    write_csv,
    write_json,
    write_text,
)  # fmt: skip


def test_files_are_written_into_new_folders(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"ε": 1})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"ε": 1}
    write_csv(tmp_path / "c.csv", [{"epoch": 0, "ce": 1.5}, {"epoch": 1, "ce": None}])
    assert (tmp_path / "c.csv").read_bytes() == b"epoch,ce\n0,1.5\n1,\n"
    write_text(tmp_path / "d.txt", "ε\r\n")
    assert (tmp_path / "d.txt").read_bytes() == "ε\r\n".encode()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "c.csv", "d.txt"]


@pytest.mark.parametrize("concurrent", [True, False])
def test_an_interrupted_write_leaves_the_old_file(concurrent: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_path(path, concurrent=concurrent) as partial:
            partial.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_replacement_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with replace_folder(folder) as new:
        (new / "a").write_text("1")
    with pytest.raises(KeyboardInterrupt), replace_folder(folder) as new:
        raise KeyboardInterrupt
    assert (folder / "a").read_text() == "1"
    folder.rename(tmp_path / ".folder.old")  # killed between the two renames
    assert (readable_folder(folder) / "a").read_text() == "1"
    with replace_folder(folder) as new:
        (new / "b").write_text("2")
    assert [p.name for p in readable_folder(folder).iterdir()] == ["b"]


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ROBUSTFPD_CACHE", raising=False)
    assert cache_folder() == tmp_path / "robustfpd"
    monkeypatch.setenv("ROBUSTFPD_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"


def test_only_expected_content_is_downloaded(tmp_path: Path) -> None:
    source, path = tmp_path / "source", tmp_path / "folder" / "copy"
    source.write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    with pytest.raises(MissingDataError, match="ended after 7 of 8 bytes"):
        download(source.as_uri(), path, sha256, 8)
    with pytest.raises(InputError, match=r"has unexpected content.*more than 6 bytes"):
        download(source.as_uri(), path, sha256, 6)
    with pytest.raises(InputError, match=rf"has unexpected content.*found SHA-256 {sha256}"):
        download(source.as_uri(), path, "0" * 64, 7)
    with pytest.raises(MissingDataError, match="cannot be fetched"):
        download((tmp_path / "missing").as_uri(), path, sha256, 7)
    assert not path.exists()
    download(source.as_uri(), path, sha256, 7)
    assert path.read_bytes() == b"weights"
    with pytest.raises(InputError, match=r"cannot be written .*set ROBUSTFPD_CACHE"):
        download(source.as_uri(), source / "copy", sha256, 7)
    with pytest.raises(InputError, match="ROBUSTFPD_MODELS must be an http, https or file address, found 'C:/models'"):
        check_url("C:/models", "ROBUSTFPD_MODELS")
