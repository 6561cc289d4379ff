from __future__ import annotations

import gzip
import hashlib
import io
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import SHARED
from tests.data.conftest import Painter
from torchvision.datasets import caltech as torchvisions
from torchvision.datasets import utils

from robustfpd.config import DataConfig
from robustfpd.data import download, image_folder, info, load
from robustfpd.data.image_files import Pixels, decode
from robustfpd.data.image_folder import BACKGROUND_101, CLASSES_101
from robustfpd.errors import InputError, MissingDataError

CLASSES_256 = [f"{number:03}.thing-{number % 7}" for number in range(1, 258)]


def config(root: Path, dataset: str = "caltech101", **settings: Any) -> DataConfig:
    small = {"image_size": 8, "test_fraction": 0.5}
    return DataConfig.model_validate({"dataset": dataset, "root": str(root), **small, **settings})


def folder(root: Path, dataset: str = "caltech101") -> Path:
    return root / dataset / f"{dataset[-3:]}_ObjectCategories"


@pytest.fixture
def small(tmp_path: Path, paint: Painter) -> Path:
    """A data root with two pictures of every class of both."""
    paint(folder(tmp_path), (BACKGROUND_101, *CLASSES_101), count=2, side=8)
    paint(folder(tmp_path, "caltech256"), CLASSES_256, count=2, side=8)
    return tmp_path


@pytest.mark.parametrize(
    ("dataset", "background", "count", "first", "last"),
    [
        ("caltech101", False, 101, "Faces", "yin_yang"),
        ("caltech101", True, 102, BACKGROUND_101, "yin_yang"),
        ("caltech256", False, 256, CLASSES_256[0], CLASSES_256[255]),
        ("caltech256", True, 257, CLASSES_256[0], CLASSES_256[256]),
    ],
)
def test_the_background_is_a_class_only_as_published(
    small: Path, dataset: str, background: bool, count: int, first: str, last: str
) -> None:
    splits = load(config(small, dataset, background=background, split="published", selection="test"))
    assert splits.info.num_classes == len(splits.info.class_names) == count
    assert (splits.info.class_names[0], splits.info.class_names[-1]) == (first, last)
    assert splits.info.class_names == tuple(sorted(splits.info.class_names))  # ImageFolder's labels
    assert len(splits.test) == count
    assert not (small / dataset / download.NOTE).exists()


def test_described_without_reading() -> None:
    assert info("caltech101").num_classes == len(info("caltech101").class_names) == 101
    assert info("caltech256").num_classes == 256


def test_missing_and_strange_class_folders_are_named(small: Path) -> None:
    shutil.rmtree(folder(small) / "okapi")
    shutil.rmtree(folder(small) / "yin_yang")
    with pytest.raises(InputError, match=r"has 99 of 101 class folders, the first missing is okapi; .*dataset=folder"):
        load(config(small))
    shutil.rmtree(folder(small, "caltech256") / CLASSES_256[41])
    with pytest.raises(InputError, match=r"has 255 of 256 class folders, the first missing is 042\.\*"):
        load(config(small, "caltech256"))


@pytest.mark.parametrize(("dataset", "name"), [("caltech101", "zebra"), ("caltech256", "258.zebra")])
def test_a_strange_class_folder_is_named(small: Path, dataset: str, name: str) -> None:
    (folder(small, dataset) / name).mkdir()
    with pytest.raises(InputError, match=f"a folder that is none of its classes, {name}"):
        load(config(small, dataset))


def test_without_the_background_its_folder_may_be_missing(small: Path) -> None:
    shutil.rmtree(folder(small) / BACKGROUND_101)
    assert load(config(small)).info.num_classes == 101
    with pytest.raises(InputError, match=f"the first missing is {BACKGROUND_101}"):
        load(config(small, background=True))


@pytest.mark.parametrize("dataset", ["caltech101", "caltech256"])
def test_missing_data_is_named_with_the_way_to_fetch_it(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(MissingDataError) as caught:
        load(config(tmp_path, dataset))
    assert str(folder(tmp_path, dataset)) in str(caught.value)
    assert "--download" in str(caught.value)
    assert not list(tmp_path.iterdir())


def _packed(content: Path, mode: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(content, content.name)
    return gzip.compress(packed.getvalue(), 1) if mode == "gz" else packed.getvalue()


@pytest.fixture
def server(small: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Archives of the small data sets where torchvision fetches them, their checksums known; the names fetched."""
    store, fetched = tmp_path_factory.mktemp("server"), list[str]()
    with zipfile.ZipFile(store / "caltech-101.zip", "w") as archive:
        archive.writestr("caltech-101/101_ObjectCategories.tar.gz", _packed(folder(small), "gz"))
    (store / "256_ObjectCategories.tar").write_bytes(_packed(folder(small, "caltech256"), ""))
    genuine = utils.download_and_extract_archive

    def local(url: str, root: str | None = None, download_root: str = "", filename: str = "", md5: str = "") -> None:
        right = hashlib.md5((store / filename).read_bytes()).hexdigest()
        genuine(f"http://nowhere.invalid/{filename}", root or download_root, filename=filename, md5=right)

    def retrieve(url: str, filename: str, *more: Any) -> None:
        fetched.append(Path(url).name)
        shutil.copyfile(store / Path(url).name, filename)

    monkeypatch.setattr(torchvisions, "download_and_extract_archive", local)
    monkeypatch.setattr(utils, "_urlretrieve", retrieve)
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **more: url)
    return fetched


ARCHIVES = {"caltech101": "caltech-101.zip", "caltech256": "256_ObjectCategories.tar"}


@pytest.mark.parametrize("dataset", ARCHIVES)
def test_what_is_missing_is_fetched_once(small: Path, tmp_path: Path, server: list[str], dataset: str) -> None:
    root = tmp_path / "fresh"
    found = load(config(root, dataset, download=True))
    assert server == [ARCHIVES[dataset]]
    assert found.test.digest() == load(config(small, dataset)).test.digest()
    load(config(root, dataset, download=True))
    load(config(root, dataset))
    assert len(server) == 1
    left = [path.name for path in (root / dataset).iterdir() if path.suffix != ".lock"]
    assert left == [folder(root, dataset).name]


@pytest.mark.parametrize("dataset", ARCHIVES)
@pytest.mark.parametrize("when", ["fetching", "unpacking"])
def test_an_interrupted_download_is_noticed_and_fetched_anew(
    tmp_path: Path, server: list[str], monkeypatch: pytest.MonkeyPatch, dataset: str, when: str
) -> None:
    root = tmp_path / "fresh"

    def half(url: str, filename: str, *more: Any) -> None:
        Path(filename).write_bytes(b"half of the archive")
        raise KeyboardInterrupt

    def partly(tar: tarfile.TarFile, path: str) -> None:
        for member in tar.getmembers()[:200]:
            tar.extract(member, path, filter="data")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "fetching":
            patch.setattr(utils, "_urlretrieve", half)
        else:
            patch.setattr(tarfile.TarFile, "extractall", partly)
        with pytest.raises(KeyboardInterrupt):
            load(config(root, dataset, download=True))
    assert folder(root, dataset).is_dir() == (when == "unpacking")
    with pytest.raises(MissingDataError, match="--download"):
        load(config(root, dataset))
    splits = load(config(root, dataset, download=True))
    assert splits.info.num_classes == (101 if dataset == "caltech101" else 256)
    assert server.count(ARCHIVES[dataset]) == 1  # an archive that was whole is not fetched again
    load(config(root, dataset))


@pytest.mark.parametrize("dataset", ARCHIVES)
def test_the_rest_of_another_programs_download_is_noticed(small: Path, server: list[str], dataset: str) -> None:
    (small / dataset / ARCHIVES[dataset]).write_bytes(b"half of the archive")
    there = folder(small, dataset)
    shutil.rmtree(next(there.iterdir()))
    kept = sorted(path.relative_to(there) for path in there.rglob("*.jpg"))
    with pytest.raises(MissingDataError, match=rf"interrupted download \(.*{ARCHIVES[dataset]} beside them\)"):
        load(config(small, dataset))
    splits = load(config(small, dataset, download=True))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 2 * splits.info.num_classes
    assert server == [ARCHIVES[dataset]]
    aside = there.with_name(f"{there.name}.incomplete")  # it may be someone's own selection
    assert sorted(path.relative_to(aside) for path in aside.rglob("*.jpg")) == kept


@pytest.mark.parametrize("dataset", ARCHIVES)
def test_an_archive_beside_a_whole_folder_does_no_harm(
    small: Path, server: list[str], monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    archive = small / dataset / ARCHIVES[dataset]
    archive.touch()
    for name in ("ARCHIVE_101", "ARCHIVE_256"):
        published = getattr(__import__("robustfpd.data.image_folder", fromlist=[name]), name)
        images = 2 * (102 if name == "ARCHIVE_101" else 257)
        monkeypatch.setattr(f"robustfpd.data.image_folder.{name}", replace(published, images=images))
    load(config(small, dataset, download=True))
    assert not server
    assert archive.exists()


def test_a_users_own_folder_is_never_touched(small: Path, server: list[str]) -> None:
    shutil.rmtree(folder(small) / "okapi")
    with pytest.raises(InputError, match="okapi"):
        load(config(small, download=True))
    assert (folder(small) / "Faces" / "image_0001.jpg").is_file()
    assert not server


def test_a_download_that_fails_is_one_line(tmp_path: Path, server: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no route to host\nreally")

    monkeypatch.setattr(utils, "_urlretrieve", fail)
    with pytest.raises(
        MissingDataError, match=r"could not be fetched into .*\(no route to host\); run again"
    ) as caught:
        load(config(tmp_path / "fresh", download=True))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not folder(SHARED / "data").is_dir(), reason="no CALTECH-101 beside the project")
def test_the_real_caltech_101_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(paths: Sequence[Path], size: tuple[int, int]) -> Iterator[Pixels | str]:
        blank = np.zeros((3, *size), dtype=np.uint8)
        for place, path in enumerate(paths):
            yield blank if place % 40 else decode(path, size)

    monkeypatch.setattr(image_folder, "decoded", few)
    published: dict[str, Any] = {"background": True, "split": "published", "selection": "test", "test_fraction": 0.1}
    splits = load(config(SHARED / "data", image_size=64, **published))
    assert splits.info.num_classes == 102
    trained, tested = splits.train.labels.bincount(), splits.test.labels.bincount()
    full = trained == 36
    assert int(full.sum()) > 80
    assert set(tested[full].tolist()) == {4}
    assert int(tested.min()) == 3
