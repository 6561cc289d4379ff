from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.data.conftest import Painter

from robustfpd.config import DataConfig
from robustfpd.data import Splits, image_folder, load
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

    monkeypatch.setattr(image_folder, "decoded", fail)


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
    with pytest.raises(InputError, match=r"test has a class 'dog' that .*train has not"):
        load(config(tmp_path))


def test_hidden_folders_and_other_files_are_no_images(tmp_path: Path, paint: Painter) -> None:
    paint(tmp_path, (*CLASSES, ".thumbnails"))
    (tmp_path / "ant" / "notes.txt").write_text("not a picture")
    (tmp_path / "README").write_text("nor this")
    assert load(config(tmp_path)).info.class_names == CLASSES


def _break(root: Path) -> list[str]:
    whole = (root / "bee" / "image_0002.jpg").read_bytes()
    (root / "bee" / "image_0002.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "cat" / "image_0001.jpg").write_bytes(b"")
    (root / "cat" / "image_0007.jpg").write_text("a text\n")
    return ["bee/image_0002.jpg", "cat/image_0001.jpg", "cat/image_0007.jpg"]


def test_bad_images_end_the_run_or_are_left_out_and_counted(tmp_path: Path, paint: Painter) -> None:
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
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    with pytest.raises(InputError, match=r"1 of 30 image files .* the first is ant/image_0003.jpg"):
        load(config(root))
    path.write_bytes(whole)
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


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, paint: Painter) -> None:
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


def test_a_cache_of_ones_own(tmp_path: Path, paint: Painter) -> None:
    load(config(paint(tmp_path / "own", CLASSES), cache=str(tmp_path / "cache")))
    assert len(list((tmp_path / "cache" / "images").glob("folder-*.images"))) == 1
    with pytest.raises(InputError, match=r"give another folder with data.cache="):
        load(config(tmp_path / "own", cache=str(tmp_path / "own" / "ant" / "image_0001.jpg")))
