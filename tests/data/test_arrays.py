from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets
from scipy.io import savemat
from torchvision.transforms import functional

from robustfpd.config import DataConfig, TaskConfig
from robustfpd.data import arrays, load
from robustfpd.errors import InputError, MissingDataError

DRAWS = np.random.default_rng(0)
TRAIN, TEST = (DRAWS.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8) for count in (60, 20))
LABELS = np.arange(60) % 10


def config(root: Path, dataset: str, **settings: Any) -> DataConfig:
    return DataConfig.model_validate({"dataset": dataset, "root": str(root), **settings})


@pytest.fixture
def svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small SVHN files, their checksums known to torchvision; the digit 0 has label 10 in them."""
    known = {}
    for split, images in (("train", TRAIN), ("test", TEST)):
        path = tmp_path / f"{split}_32x32.mat"
        labels = np.where(LABELS == 0, 10, LABELS)[: len(images), None]
        savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": labels})
        known[split] = ["http://nowhere.invalid", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", known)
    return tmp_path


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small CIFAR-10 files, their checksums known to torchvision."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()

    def write(name: str, content: dict[str, Any]) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    parts = [(f"data_batch_{i}", TRAIN[12 * i : 12 * i + 12], LABELS[12 * i : 12 * i + 12]) for i in range(5)]
    written = [write(n, {"data": x.reshape(-1, 3072), "labels": y.tolist()}) for n, x, y in parts]
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", written)
    monkeypatch.setattr(
        kind, "test_list", [write("test_batch", {"data": TEST.reshape(-1, 3072), "labels": LABELS[:20].tolist()})]
    )
    name, md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(kind, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return tmp_path


@pytest.fixture(params=["svhn", "cifar10"])
def stored(request: pytest.FixtureRequest) -> tuple[str, Path]:
    return request.param, request.getfixturevalue(request.param)


def test_rgb_images_are_read_unchanged(stored: tuple[str, Path]) -> None:
    dataset, root = stored
    splits = load(config(root, dataset))
    assert splits.info.task == TaskConfig(num_classes=10, in_channels=3, image_size=(32, 32))
    assert np.array_equal(splits.test.images.numpy(), TEST)
    assert splits.test.labels.tolist() == LABELS[:20].tolist()
    assert splits.test.labels.dtype == torch.int64
    expected = sorted(image.tobytes() for image in TRAIN)
    images = torch.cat([splits.train.images, splits.validation.images])
    assert sorted(image.numpy().tobytes() for image in images) == expected


def test_missing_files_are_named(tmp_path: Path) -> None:
    for dataset, name in (("svhn", "train_32x32.mat"), ("cifar10", "cifar-10-batches-py")):
        with pytest.raises(MissingDataError, match=f"looked in .*{name}; add --download"):
            load(config(tmp_path, dataset))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["half", "gone"])
def test_damaged_files_are_detected(stored: tuple[str, Path], damage: str) -> None:
    dataset, root = stored
    path = root / ("test_32x32.mat" if dataset == "svhn" else "cifar-10-batches-py/data_batch_3")
    content = path.read_bytes()
    path.unlink()
    if damage == "half":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(MissingDataError, match=f"{dataset} is incomplete or damaged in .* add --download") as caught:
        load(config(root, dataset))
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_resized_once(svhn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    larger = config(svhn, "svhn", image_size=40, stored_size=48)
    splits = load(larger)
    assert (splits.test.size, splits.test.stored_size) == ((40, 40), (48, 48))
    expected = functional.resize(torch.from_numpy(TEST), [48, 48], antialias=True)
    assert (splits.test.images.int() - expected.int()).abs().max() <= 1
    assert splits.test.labels.tolist() == LABELS[:20].tolist()
    monkeypatch.setattr(arrays, "_resize", None)
    again = load(larger)
    for part in ("train", "validation", "test"):
        assert getattr(again, part).digest() == getattr(splits, part).digest()


def test_changed_images_are_not_read_from_the_cache(svhn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smaller = config(svhn, "svhn", image_size=8)
    before = load(smaller).test.digest()
    monkeypatch.setattr(torchvision.datasets.SVHN, "_check_integrity", lambda self: True)
    savemat(svhn / "test_32x32.mat", {"X": (255 - TEST).transpose(2, 3, 1, 0), "y": LABELS[:20, None]})
    assert load(smaller).test.digest() != before


def test_a_rectangular_size_keeps_the_aspect_ratio(svhn: Path) -> None:
    splits = load(config(svhn, "svhn", image_size=(16, 32)))
    assert np.array_equal(splits.test.images.numpy(), TEST[:, :, 8:24])


def test_a_native_size_is_not_cached(svhn: Path, tmp_path: Path) -> None:
    load(config(svhn, "svhn", image_size=24, stored_size=32, cache=str(tmp_path / "cache")))
    assert not (tmp_path / "cache").exists()


def test_rgb_images_cannot_be_converted_to_grey(stored: tuple[str, Path]) -> None:
    dataset, root = stored
    with pytest.raises(InputError, match=f"{dataset} has RGB images, which cannot be converted to grey"):
        load(config(root, dataset, channels=1))


def _idx(path: Path, values: np.ndarray[Any, Any]) -> None:
    """Write uint8 values as the MNIST files have them."""
    header = (0x0800 + values.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.mark.parametrize("reachable", [True, False])
def test_unpacked_files_that_are_cut_off_are_fetched_anew_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reachable: bool
) -> None:
    raw = tmp_path / "MNIST" / "raw"

    def fetch(self: torchvision.datasets.MNIST) -> None:
        if raw.is_dir():  # as torchvision does: what is there is there
            return
        if not reachable:
            raise RuntimeError("no route to host")
        raw.mkdir(parents=True)
        for part in ("train", "t10k"):
            _idx(raw / f"{part}-images-idx3-ubyte", np.full((20, 28, 28), 7))
            _idx(raw / f"{part}-labels-idx1-ubyte", np.arange(20) % 10)

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", fetch)
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        _idx(raw / f"{part}-images-idx3-ubyte", np.full((20, 28, 28), 7))
        _idx(raw / f"{part}-labels-idx1-ubyte", np.arange(20) % 10)
    path = raw / "train-images-idx3-ubyte"
    cut = path.read_bytes()[:5000]
    path.write_bytes(cut)
    with pytest.raises(MissingDataError, match="add --download to retry"):
        load(config(tmp_path, "mnist"))
    if reachable:
        assert len(load(config(tmp_path, "mnist", download=True)).test) == 20
        assert (tmp_path / "MNIST" / "raw.incomplete" / path.name).read_bytes() == cut
    else:
        with pytest.raises(MissingDataError, match="could not be fetched into"):
            load(config(tmp_path, "mnist", download=True))
        assert path.read_bytes() == cut
