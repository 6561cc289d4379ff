from __future__ import annotations

import functools
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import robustfpd as rf
from robustfpd import io
from robustfpd.errors import InputError, MissingDataError
from robustfpd.models import zoo

NAME = "tiny/plain"
FILES = (*zoo.VERIFIED, "README.md", "results/a.json")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models/ folder with one network and the manifest that names it; the package runs from no checkout."""
    folder = tmp_path / "models"
    task = rf.TaskConfig(num_classes=3, in_channels=1, image_size=(8, 8))
    rf.build(task, rf.ModelConfig(defence="none", activation="keep")).save(folder / NAME)
    rf.RunConfig(recipe="digits/mini").save(folder / NAME / "config.yaml")
    (folder / NAME / "results").mkdir()
    for name in ("README.md", "results/a.json"):
        (folder / NAME / name).write_text("x\n")
    entry = {
        "description": "Tiny", "recipe": "digits/mini", "dataset": "digits", "defence": "none", "training": "noise 0",
        "results": [f"{NAME}/results/a.json"],
        "files": [
            {"path": f"{NAME}/{name}", "sha256": zoo.digest(folder / NAME / name),
             "size": (folder / NAME / name).stat().st_size}
            for name in FILES
        ],
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps({"models": {NAME: entry, "tiny/other": _renamed(entry)}}))
    monkeypatch.setattr(zoo, "MANIFEST", tmp_path / "manifest.json")
    monkeypatch.setattr(zoo, "checkout", lambda: None)
    monkeypatch.setenv("ROBUSTFPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(zoo.VARIABLE, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    return folder


def _renamed(entry: dict[str, Any]) -> dict[str, Any]:
    renamed: dict[str, Any] = json.loads(json.dumps(entry).replace(NAME, "tiny/other"))
    return renamed


@pytest.fixture
def from_folder(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(zoo.VARIABLE, models.as_uri())
    return models


@pytest.fixture
def from_checkout(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(zoo, "checkout", lambda: models)
    return models


def _served(handler: Any) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for address in _served(functools.partial(Quiet, directory=str(models))):
        monkeypatch.setenv(zoo.VARIABLE, address)
        yield address


def spoil(path: Path) -> None:
    """Other bytes, as many."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def message(name: str = NAME, kind: type[InputError] = InputError) -> str:
    with pytest.raises(kind) as caught:
        zoo.find(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def kept(tmp_path: Path) -> list[str]:
    root = tmp_path / "cache"
    return sorted(str(p.relative_to(root / "models" / NAME)) for p in root.rglob("*") if p.is_file())


def test_a_name_is_loaded_from_the_checkout_and_fetches_nothing(from_checkout: Path, tmp_path: Path) -> None:
    assert zoo.find(NAME) == from_checkout / NAME
    assert zoo.place(NAME) == ("checkout", from_checkout / NAME)
    loaded, saved = rf.load(NAME), rf.load(from_checkout / NAME)
    assert all(torch.equal(t, saved.state_dict()[name]) for name, t in loaded.state_dict().items())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("file", zoo.VERIFIED)
def test_a_wrong_file_in_the_checkout_is_an_error(from_checkout: Path, file: str) -> None:
    expected = zoo.digest(from_checkout / NAME / file)
    spoil(from_checkout / NAME / file)
    error = message()
    found = zoo.digest(from_checkout / NAME / file)
    assert found != expected
    for part in (str(from_checkout / NAME / file), expected, found, "git checkout"):
        assert part in error
    assert zoo.place(NAME)[0] == "checkout, damaged"


def test_an_incomplete_checkout_is_not_used(from_checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = from_checkout.with_name("copy")
    shutil.copytree(from_checkout, copy)
    (from_checkout / NAME / "config.json").unlink()
    assert str(from_checkout / NAME) in message(kind=MissingDataError)
    monkeypatch.setenv(zoo.VARIABLE, copy.as_uri())
    assert zoo.find(NAME) == zoo.cached() / NAME


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_fetched_name_stays_in_the_cache(
    from_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slash: str
) -> None:
    monkeypatch.setenv(zoo.VARIABLE, from_folder.as_uri() + slash)
    assert zoo.place(NAME) == ("to be fetched", None)
    assert isinstance(rf.load(NAME), rf.Baseline)
    assert kept(tmp_path) == sorted(FILES)
    shutil.rmtree(from_folder)
    assert isinstance(rf.load(NAME), rf.Baseline)
    monkeypatch.delenv(zoo.VARIABLE)
    assert isinstance(rf.load(NAME), rf.Baseline)
    assert zoo.place(NAME) == ("cache", tmp_path / "cache" / "models" / NAME)


def test_a_name_is_fetched_from_a_server(server: str, tmp_path: Path) -> None:
    assert isinstance(rf.load(NAME), rf.Baseline)
    assert kept(tmp_path) == sorted(FILES)


def test_without_an_address_the_three_places_are_named(models: Path, tmp_path: Path) -> None:
    error = message(kind=MissingDataError)
    for part in ("no checkout", str(tmp_path / "cache" / "models" / NAME), zoo.VARIABLE, "is not set"):
        assert part in error


def test_a_server_without_the_file_and_one_that_is_not_there(
    server: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (models / NAME / "config.yaml").unlink()
    error = message(kind=MissingDataError)
    assert f"{server}/{NAME}/config.yaml is not there: the server answered 404" in error
    monkeypatch.setenv(zoo.VARIABLE, "http://127.0.0.1:1")
    assert "cannot be fetched" in message(kind=MissingDataError)
    monkeypatch.setenv(zoo.VARIABLE, (models / "nowhere").as_uri())
    assert "cannot be fetched" in message(kind=MissingDataError)


@pytest.mark.parametrize("address", ["/data/models", "ftp://example.org/models", "models", "data:,x"])
def test_only_http_and_file_addresses_are_taken(models: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv(zoo.VARIABLE, address)
    assert re.search(rf"{zoo.VARIABLE} must be an http, https or file address, found '{address}'", message())


@pytest.mark.parametrize("file", zoo.VERIFIED)
def test_another_file_at_the_address_is_not_kept(from_folder: Path, tmp_path: Path, file: str) -> None:
    expected = zoo.digest(from_folder / NAME / file)
    spoil(from_folder / NAME / file)
    error = message()
    for part in (f"{NAME}/{file}", expected, zoo.digest(from_folder / NAME / file), "was not saved"):
        assert part in error
    assert file not in kept(tmp_path)
    assert zoo.place(NAME) == ("to be fetched", None)


def test_no_more_is_read_than_the_manifest_says(from_folder: Path, tmp_path: Path) -> None:
    with (from_folder / NAME / "model.safetensors").open("ab") as file:
        file.write(b"x" * 100_000)
    assert "found more than" in message()
    assert "model.safetensors" not in kept(tmp_path)


class CutOff(Quiet):
    """Promises the whole file, then hangs up in the middle."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        outputfile.write(source.read()[:-1])


class Garbled(BaseHTTPRequestHandler):
    """Does not speak HTTP."""

    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"hello\r\n\r\n")


def test_a_download_that_is_cut_off_leaves_the_name_usable(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in _served(functools.partial(CutOff, directory=str(models))):
        monkeypatch.setenv(zoo.VARIABLE, address)
        assert re.search(r"ended after [\d,]+ of [\d,]+ bytes; try again", message(kind=MissingDataError))
    assert kept(tmp_path) == []
    monkeypatch.setenv(zoo.VARIABLE, models.as_uri())
    assert zoo.find(NAME) == zoo.cached() / NAME


def test_a_server_that_is_no_web_server_gives_a_one_line_error(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in _served(Garbled):
        monkeypatch.setenv(zoo.VARIABLE, address)
        assert "cannot be fetched" in message(kind=MissingDataError)


@pytest.mark.parametrize("file", zoo.VERIFIED)
def test_a_wrong_file_in_the_cache_is_fetched_anew(
    from_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    path = zoo.find(NAME) / file
    right = path.read_bytes()
    spoil(path)
    monkeypatch.delenv(zoo.VARIABLE)
    error = message()
    for part in (str(path), zoo.digest(path), "delete it", zoo.VARIABLE):
        assert part in error
    assert zoo.place(NAME)[0] == "cache, damaged"
    monkeypatch.setenv(zoo.VARIABLE, from_folder.as_uri())
    assert (zoo.find(NAME) / file).read_bytes() == right
    assert kept(tmp_path) == sorted(FILES)


def test_a_half_written_file_in_the_cache_is_fetched_anew(from_folder: Path) -> None:
    weights = zoo.find(NAME) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert isinstance(rf.load(NAME), rf.Baseline)


def test_an_interrupted_write_leaves_nothing_behind(
    from_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            zoo.find(NAME)
    assert kept(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_named(
    from_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("ROBUSTFPD_CACHE", str(tmp_path / "file"))
    error = message()
    assert str(tmp_path / "file") in error
    assert "cannot be written" in error
    assert "set ROBUSTFPD_CACHE" in error
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["../x", "tiny/../tiny/plain", "/etc", "", "tiny", "tiny/plain/", ".", "tiny\\plain"])
def test_malformed_names_are_unknown(from_checkout: Path, name: str) -> None:
    assert f"unknown model {name!r}" in message(name)
    with pytest.raises(InputError, match="no model in"):
        rf.load(name)


def test_the_nearest_names_are_suggested(from_checkout: Path) -> None:
    assert "did you mean 'tiny/plain'" in message("tiny/plian")
    with pytest.raises(MissingDataError, match=r"no model in tiny/plian.*did you mean 'tiny/plain'.*robustfpd models"):
        rf.load("tiny/plian")
    with pytest.raises(MissingDataError, match=r"config\.json is not there"):
        rf.load("runs/nowhere")


def test_a_folder_with_a_model_goes_before_the_name(from_checkout: Path, tmp_path: Path) -> None:
    own = tmp_path / NAME
    own.mkdir(parents=True)
    (own / "notes.txt").write_text("no model")
    assert zoo.locate(NAME) == from_checkout / NAME
    task = rf.TaskConfig(num_classes=2, in_channels=1, image_size=(8, 8))
    rf.build(task, rf.ModelConfig()).save(own / "checkpoints" / "best")
    assert rf.load(NAME).task.num_classes == 2
    assert rf.load(Path(NAME)).task.num_classes == 2
    shutil.rmtree(own)
    assert rf.load(Path(NAME)).task.num_classes == 3


def test_a_damaged_model_in_a_folder_is_not_replaced_by_the_name(from_checkout: Path, tmp_path: Path) -> None:
    own = tmp_path / NAME
    shutil.copytree(from_checkout / NAME, own)
    (own / "config.json").unlink()
    with pytest.raises(MissingDataError, match=r"config\.json is not there"):
        rf.load(NAME)


def test_a_folder_gives_the_name_of_its_model(from_checkout: Path, tmp_path: Path) -> None:
    assert zoo.named(from_checkout / NAME) == NAME
    assert zoo.named(zoo.cached() / NAME) == NAME
    assert zoo.named(tmp_path / NAME) is None


@pytest.mark.parametrize(
    "path",
    ["../plain/x", "/tiny/plain/x", "tiny/plain/../../x", "tiny/plain", "tiny/plain/.x", "tiny\\plain/x", "tiny//x",
     "tiny/other2/x", "tiny/plain/a b"],
)  # fmt: skip
def test_a_manifest_that_leads_out_of_the_folder_is_refused(models: Path, path: str) -> None:
    values = json.loads(zoo.MANIFEST.read_text())
    values["models"][NAME]["files"][3]["path"] = path
    zoo.MANIFEST.write_text(json.dumps(values))
    with pytest.raises(InputError, match="manifest"):
        zoo.names()


def test_a_manifest_that_lacks_a_file_is_refused(models: Path) -> None:
    values = json.loads(zoo.MANIFEST.read_text())
    del values["models"][NAME]["files"][0]
    zoo.MANIFEST.write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"config\.yaml is not listed; reinstall robustfpd"):
        zoo.names()


def test_the_package_knows_its_checkout() -> None:
    root = Path(__file__).parents[2]
    assert zoo.checkout() == root / "models"
    assert zoo.names() == sorted(zoo.manifest().models)


def test_an_unknown_kind_of_address_says_what_fits() -> None:
    io.check_url("https://example.org/models", "X")
    with pytest.raises(InputError, match="a folder is file:///"):
        io.check_url("C:/models", "X")
