from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import tarfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import SHARED
from tests.data.conftest import Painter
from torchvision.datasets import caltech as torchvisions
from torchvision.datasets import utils

from robustfpd.config import DataConfig
from robustfpd.data import Splits, download, image_folder, info, load
from robustfpd.data.image_files import Pixels, decode_pixels
from robustfpd.data.image_folder import BACKGROUND_101, CLASSES_101
from robustfpd.errors import InputError, MissingDataError

CLASSES = ("ant", "bee", "cat")


def config(root: Path, **settings: Any) -> DataConfig:
    return DataConfig.model_validate({"dataset": "folder", "root": str(root), "image_size": 16, **settings})


def shades(images: torch.Tensor) -> list[int]:
    """The painter's number of each picture."""
    return (images[:, 1].float().mean(dim=(1, 2)) / 8).round().int().tolist()


def digests(splits: Splits) -> list[str]:
    return [part.digest() for part in (splits.train, splits.validation, splits.test)]


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file may be decoded from here on."""

    def fail(*arguments: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(image_folder, "decode_pixels", fail)


def test_a_folder_of_class_folders_is_split_in_three(tmp_path: Path, paint: Painter) -> None:
    splits = load(config(paint(tmp_path, CLASSES), stored_size=18, test_fraction=0.2))
    assert splits.info.class_names == CLASSES
    assert splits.info.num_classes == splits.info.task.num_classes == 3
    assert splits.info.image_size == splits.train.size == (16, 16)
    assert splits.train.stored_size == (18, 18)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [21, 3, 6]
    found = []
    for part in (splits.train, splits.validation, splits.test):
        red = (part.images[:, 0].float().mean(dim=(1, 2)) / 20).round().int().tolist()
        assert red == part.labels.tolist()
        found += list(zip(red, shades(part.images), strict=True))
    assert sorted(found) == [(label, number) for label in range(3) for number in range(1, 11)]
    assert splits.skipped == ()


def test_the_published_split_takes_the_last_files(tmp_path: Path, paint: Painter) -> None:
    splits = load(config(paint(tmp_path, CLASSES), split="published", selection="test"))
    assert shades(splits.train.images) == [*range(1, 10)] * 3
    assert shades(splits.test.images) == [10] * 3
    assert splits.validation.digest() == splits.test.digest()


def test_the_second_time_nothing_is_decoded(tmp_path: Path, paint: Painter, request: pytest.FixtureRequest) -> None:
    root, calls = paint(tmp_path, CLASSES), list[tuple[int, int]]()
    first = digests(load(config(root), lambda done, total: calls.append((done, total))))
    assert calls == [(done, 30) for done in range(1, 31)]
    request.getfixturevalue("undecoded")
    assert digests(load(config(root))) == first
    for other in ({"split": "published"}, {"split_seed": 3}, {"on_bad_image": "skip"}, {"train_limit": 5}):
        load(config(root, **other))  # these do not change pixels
    moved = root.rename(root.with_name("moved"))
    assert digests(load(config(moved))) == first


@pytest.mark.parametrize("change", ["content", "another time", "a new file", "a name", "a size"])
def test_what_changes_pixels_is_decoded_again(tmp_path: Path, paint: Painter, change: str) -> None:
    root = paint(tmp_path, CLASSES)
    before, path, settings = digests(load(config(root))), root / "bee" / "image_0004.jpg", {}
    if change == "content":
        Image.new("RGB", (30, 30)).save(path)
    if change == "another time":
        Image.new("RGB", (20, 20), (20, 31, 60)).save(path.with_name("x.jpg"), quality=95)
        shutil.copyfile(path.with_name("x.jpg"), path)
        path.with_name("x.jpg").unlink()
        os.utime(path, ns=(1, 1))
    if change == "a new file":
        Image.new("RGB", (30, 30)).save(path.with_name("more.png"))
    if change == "a name":
        path.rename(path.with_name("zzz.jpg"))
    if change == "a size":
        settings = {"image_size": 12}
    calls = list[int]()
    after = digests(load(config(root, **settings), lambda done, total: calls.append(done)))
    assert len(calls) == 30 + (change == "a new file")
    assert before != after


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_a_test_folder_is_the_test_set(tmp_path: Path, paint: Painter, name: str) -> None:
    paint(tmp_path / "train", CLASSES)
    paint(tmp_path / name, CLASSES, count=2)
    if name == "test":
        paint(tmp_path / "val", CLASSES, count=5)
    splits = load(config(tmp_path))
    assert splits.info.class_names == CLASSES
    assert shades(splits.test.images) == [1, 2] * 3
    assert splits.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(splits.train) + len(splits.validation) == 30


def test_a_training_folder_alone_is_split(tmp_path: Path, paint: Painter) -> None:
    paint(tmp_path / "train", CLASSES)
    splits = load(config(tmp_path))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [24, 3, 3]


def test_a_class_may_be_called_train(tmp_path: Path, paint: Painter) -> None:
    paint(tmp_path, ("car", "plane", "train"))
    assert load(config(tmp_path)).info.class_names == ("car", "plane", "train")


def test_a_class_in_the_test_folder_alone_is_named(tmp_path: Path, paint: Painter) -> None:
    paint(tmp_path / "train", CLASSES)
    paint(tmp_path / "test", (*CLASSES, "dog"))
    with pytest.raises(InputError, match=r"test has a class 'dog' that .*train lacks"):
        load(config(tmp_path))


def test_hidden_folders_and_other_files_are_ignored(tmp_path: Path, paint: Painter) -> None:
    paint(tmp_path, (*CLASSES, ".thumbnails"))
    (tmp_path / "ant" / "notes.txt").write_text("not a picture")
    (tmp_path / "README").write_text("nor this")
    assert load(config(tmp_path)).info.class_names == CLASSES


def _break(root: Path) -> list[str]:
    content = (root / "bee" / "image_0002.jpg").read_bytes()
    (root / "bee" / "image_0002.jpg").write_bytes(content[: len(content) // 2])
    (root / "cat" / "image_0001.jpg").write_bytes(b"")
    (root / "cat" / "image_0007.jpg").write_text("a text\n")
    return ["bee/image_0002.jpg", "cat/image_0001.jpg", "cat/image_0007.jpg"]


def test_bad_images_raise_an_error_or_are_skipped(tmp_path: Path, paint: Painter) -> None:
    root = paint(tmp_path / "own", CLASSES)
    bad = _break(root)
    for _ in range(2):  # freshly decoded, and from the cache
        with pytest.raises(InputError) as caught:
            load(config(root))
        message = str(caught.value)
        assert f"3 of 30 image files in {root} cannot be decoded, the first is {bad[0]}" in message
        assert "runcated" in message
        assert "data.on_bad_image=skip" in message
        assert "\n" not in message
    with pytest.warns(UserWarning, match="3 of 30 image files") as warned:
        splits = load(config(root, on_bad_image="skip"))
    assert len(warned) == 1
    assert all(name in str(warned[0].message) for name in bad)
    assert warned[0].filename == __file__
    assert splits.skipped == tuple(bad)
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 27
    for part in (splits.train, splits.validation, splits.test):
        assert float(part.images.float().mean(dim=(1, 2, 3)).min()) > 20  # no black stand-ins
    with pytest.raises(InputError):  # not the split of a moment ago
        load(config(root))


def test_a_fixed_image_is_used(tmp_path: Path, paint: Painter) -> None:
    root = paint(tmp_path, CLASSES)
    path = root / "ant" / "image_0003.jpg"
    content = path.read_bytes()
    path.write_bytes(content[:50])
    with pytest.raises(InputError, match=r"1 of 30 image files .* the first is ant/image_0003.jpg"):
        load(config(root))
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(config(root, on_bad_image="skip")).skipped == ()


def test_skipping_never_empties_a_class(tmp_path: Path, paint: Painter) -> None:
    root = paint(tmp_path, CLASSES)
    for path in (root / "bee").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"10 of 30 .* none is left of class 'bee'"):
        load(config(root, on_bad_image="skip"))


def test_long_lists_of_bad_images_are_cut_in_the_warning(tmp_path: Path, paint: Painter) -> None:
    root = paint(tmp_path, CLASSES)
    for number in range(1, 6):
        (root / "bee" / f"image_{number:04}.jpg").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"bee/image_0003.jpg and 2 more$"):
        assert len(load(config(root, on_bad_image="skip")).skipped) == 5


@pytest.mark.parametrize("classes", [(), ("ant",)])
def test_fewer_than_two_classes_are_an_input_error(tmp_path: Path, paint: Painter, classes: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match=f"at least two classes, found {len(classes)}"):
        load(config(paint(tmp_path, classes)))


def test_a_class_without_images_is_named(tmp_path: Path, paint: Painter) -> None:
    paint(tmp_path, CLASSES)
    (tmp_path / "bat").mkdir()
    with pytest.raises(InputError, match="bat has no image files"):
        load(config(tmp_path))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=f"no folder {tmp_path / 'nowhere'}; give .* --data-root"):
        load(config(tmp_path / "nowhere"))


def test_a_broken_link_is_named(tmp_path: Path, paint: Painter) -> None:
    paint(tmp_path, CLASSES)
    (tmp_path / "ant" / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(InputError, match=r"link.jpg cannot be read"):
        load(config(tmp_path, on_bad_image="skip"))


def test_sizes_and_channels_that_do_not_fit_are_input_errors(tmp_path: Path, paint: Painter) -> None:
    paint(tmp_path, CLASSES)
    with pytest.raises(InputError, match="stored_size 15×16 must be at least the network's size, 16×16"):
        load(config(tmp_path, stored_size=(15, 16)))
    with pytest.raises(InputError, match=r"data.channels: folder has RGB images"):
        load(config(tmp_path, channels=1))


def test_the_cache_folder_can_be_set(tmp_path: Path, paint: Painter) -> None:
    load(config(paint(tmp_path / "own", CLASSES), cache=str(tmp_path / "cache")))
    assert len(list((tmp_path / "cache" / "images").glob("folder-*.images"))) == 1
    with pytest.raises(InputError, match=r"give another folder with data.cache="):
        load(config(tmp_path / "own", cache=str(tmp_path / "own" / "ant" / "image_0001.jpg")))


CLASSES_256 = [f"{number:03}.thing-{number % 7}" for number in range(1, 258)]


def caltech(root: Path, dataset: str = "caltech101", **settings: Any) -> DataConfig:
    small = {"image_size": 8, "test_fraction": 0.5}
    return DataConfig.model_validate({"dataset": dataset, "root": str(root), **small, **settings})


def caltech_folder(root: Path, dataset: str = "caltech101") -> Path:
    return root / dataset / f"{dataset[-3:]}_ObjectCategories"


@pytest.fixture
def small(tmp_path: Path, paint: Painter) -> Path:
    """A data root with two pictures of every class of both."""
    paint(caltech_folder(tmp_path), (BACKGROUND_101, *CLASSES_101), count=2, side=8)
    paint(caltech_folder(tmp_path, "caltech256"), CLASSES_256, count=2, side=8)
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
    splits = load(caltech(small, dataset, background=background, split="published", selection="test"))
    assert splits.info.num_classes == len(splits.info.class_names) == count
    assert (splits.info.class_names[0], splits.info.class_names[-1]) == (first, last)
    assert splits.info.class_names == tuple(sorted(splits.info.class_names))  # ImageFolder's labels
    assert len(splits.test) == count
    assert not (small / dataset / download.NOTE).exists()


def test_caltech_class_counts_need_no_files() -> None:
    assert info("caltech101").num_classes == len(info("caltech101").class_names) == 101
    assert info("caltech256").num_classes == 256


def test_missing_class_folders_are_named(small: Path) -> None:
    shutil.rmtree(caltech_folder(small) / "okapi")
    shutil.rmtree(caltech_folder(small) / "yin_yang")
    with pytest.raises(InputError, match=r"has 99 of 101 class folders, the first missing is okapi; .*dataset=folder"):
        load(caltech(small))
    shutil.rmtree(caltech_folder(small, "caltech256") / CLASSES_256[41])
    with pytest.raises(InputError, match=r"has 255 of 256 class folders, the first missing is 042\.\*"):
        load(caltech(small, "caltech256"))


@pytest.mark.parametrize(("dataset", "name"), [("caltech101", "zebra"), ("caltech256", "258.zebra")])
def test_an_unknown_class_folder_is_named(small: Path, dataset: str, name: str) -> None:
    (caltech_folder(small, dataset) / name).mkdir()
    with pytest.raises(InputError, match=f"a folder that is none of its classes, {name}"):
        load(caltech(small, dataset))


def test_without_the_background_its_folder_may_be_missing(small: Path) -> None:
    shutil.rmtree(caltech_folder(small) / BACKGROUND_101)
    assert load(caltech(small)).info.num_classes == 101
    with pytest.raises(InputError, match=f"the first missing is {BACKGROUND_101}"):
        load(caltech(small, background=True))


@pytest.mark.parametrize("dataset", ["caltech101", "caltech256"])
def test_missing_data_is_named_with_the_way_to_fetch_it(tmp_path: Path, dataset: str) -> None:
    with pytest.raises(MissingDataError) as caught:
        load(caltech(tmp_path, dataset))
    assert str(caltech_folder(tmp_path, dataset)) in str(caught.value)
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
        archive.writestr("caltech-101/101_ObjectCategories.tar.gz", _packed(caltech_folder(small), "gz"))
    (store / "256_ObjectCategories.tar").write_bytes(_packed(caltech_folder(small, "caltech256"), ""))
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
def test_missing_data_are_downloaded_once(small: Path, tmp_path: Path, server: list[str], dataset: str) -> None:
    root = tmp_path / "fresh"
    found = load(caltech(root, dataset, download=True))
    assert server == [ARCHIVES[dataset]]
    assert found.test.digest() == load(caltech(small, dataset)).test.digest()
    load(caltech(root, dataset, download=True))
    load(caltech(root, dataset))
    assert len(server) == 1
    left = [path.name for path in (root / dataset).iterdir() if path.suffix != ".lock"]
    assert left == [caltech_folder(root, dataset).name]


@pytest.mark.parametrize("dataset", ARCHIVES)
@pytest.mark.parametrize("when", ["fetching", "unpacking"])
def test_an_interrupted_download_is_detected_and_repeated(
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
            load(caltech(root, dataset, download=True))
    assert caltech_folder(root, dataset).is_dir() == (when == "unpacking")
    with pytest.raises(MissingDataError, match="--download"):
        load(caltech(root, dataset))
    splits = load(caltech(root, dataset, download=True))
    assert splits.info.num_classes == (101 if dataset == "caltech101" else 256)
    assert server.count(ARCHIVES[dataset]) == 1  # a complete archive is not downloaded again
    load(caltech(root, dataset))


@pytest.mark.parametrize("dataset", ARCHIVES)
def test_an_interrupted_download_of_another_program_is_detected(small: Path, server: list[str], dataset: str) -> None:
    (small / dataset / ARCHIVES[dataset]).write_bytes(b"half of the archive")
    there = caltech_folder(small, dataset)
    shutil.rmtree(next(there.iterdir()))
    kept = sorted(path.relative_to(there) for path in there.rglob("*.jpg"))
    with pytest.raises(MissingDataError, match=rf"interrupted download \(.*{ARCHIVES[dataset]} beside them\)"):
        load(caltech(small, dataset))
    splits = load(caltech(small, dataset, download=True))
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 2 * splits.info.num_classes
    assert server == [ARCHIVES[dataset]]
    aside = there.with_name(f"{there.name}.incomplete")  # it may be someone's own selection
    assert sorted(path.relative_to(aside) for path in aside.rglob("*.jpg")) == kept


@pytest.mark.parametrize("dataset", ARCHIVES)
def test_an_archive_beside_a_complete_folder_is_ignored(
    small: Path, server: list[str], monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    archive = small / dataset / ARCHIVES[dataset]
    archive.touch()
    for name in ("ARCHIVE_101", "ARCHIVE_256"):
        published = getattr(__import__("robustfpd.data.image_folder", fromlist=[name]), name)
        images = 2 * (102 if name == "ARCHIVE_101" else 257)
        monkeypatch.setattr(f"robustfpd.data.image_folder.{name}", replace(published, images=images))
    load(caltech(small, dataset, download=True))
    assert not server
    assert archive.exists()


def test_a_users_folder_is_not_changed(small: Path, server: list[str]) -> None:
    shutil.rmtree(caltech_folder(small) / "okapi")
    with pytest.raises(InputError, match="okapi"):
        load(caltech(small, download=True))
    assert (caltech_folder(small) / "Faces" / "image_0001.jpg").is_file()
    assert not server


def test_a_download_that_fails_is_one_line(tmp_path: Path, server: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no route to host\nreally")

    monkeypatch.setattr(utils, "_urlretrieve", fail)
    with pytest.raises(
        MissingDataError, match=r"could not be fetched into .*\(no route to host\); run again"
    ) as caught:
        load(caltech(tmp_path / "fresh", download=True))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not caltech_folder(SHARED / "data").is_dir(), reason="no CALTECH-101 beside the project")
def test_the_real_caltech_101_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(paths: Sequence[Path], size: tuple[int, int]) -> Iterator[Pixels | str]:
        blank = np.zeros((3, *size), dtype=np.uint8)
        for place, path in enumerate(paths):
            yield blank if place % 40 else next(decode_pixels([path], size))

    monkeypatch.setattr(image_folder, "decode_pixels", few)
    published: dict[str, Any] = {"background": True, "split": "published", "selection": "test", "test_fraction": 0.1}
    splits = load(caltech(SHARED / "data", image_size=64, **published))
    assert splits.info.num_classes == 102
    trained, tested = splits.train.labels.bincount(), splits.test.labels.bincount()
    full = trained == 36
    assert int(full.sum()) > 80
    assert set(tested[full].tolist()) == {4}
    assert int(tested.min()) == 3
