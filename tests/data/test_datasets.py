from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from robustfpd.config import DataConfig, TaskConfig
from robustfpd.data import ImageSet, info, load, names
from robustfpd.data.datasets import class_names
from robustfpd.errors import InputError, MissingDataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">{1 + array.ndim}i", 0x0800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_mnist(root: Path, train: int = 60, test: int = 20, side: int = 28) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    arrays = {}
    for name, count in zip(FILES, (train, train, test, test), strict=True):
        labels = "labels" in name
        arrays[name] = np.arange(count) % 10 if labels else draws.integers(0, 256, (count, side, side))
        (folder / name).write_bytes(idx(arrays[name]))
    return arrays


def mnist(root: Path) -> DataConfig:
    return DataConfig(dataset="mnist", root=str(root))


def rows(images: ImageSet) -> list[tuple[int, bytes]]:
    pairs = zip(images.labels.tolist(), images.images, strict=True)
    return sorted((label, image.numpy().tobytes()) for label, image in pairs)


def test_every_data_set_is_described() -> None:
    assert names() == sorted(names())
    for name in names():
        dataset = info(name)
        assert dataset.name == name
        assert dataset.description
        if name not in ("caltech256", "folder"):  # its classes depend on the files
            assert len(dataset.class_names) == dataset.num_classes
        if name != "folder":
            assert dataset.task.num_classes == dataset.num_classes
            assert dataset.task.image_size == dataset.image_size
            assert dataset.task.in_channels == dataset.in_channels


def test_an_unknown_data_set_names_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown dataset 'digit'; did you mean 'digits'"):
        info("digit")
    with pytest.raises(InputError, match="unknown dataset 'mnits'; did you mean 'mnist'"):
        load(DataConfig(dataset="mnits"))


def test_the_digits_are_those_of_scikit_learn_split_in_three() -> None:
    from sklearn.datasets import load_digits

    splits = load(DataConfig())
    parts = (splits.train, splits.validation, splits.test)
    bundle = load_digits()
    scaled = np.round(bundle.images * 255 / 16).astype(np.uint8)
    expected = sorted((int(y), x.tobytes()) for x, y in zip(scaled, bundle.target, strict=True))
    assert len(expected) == 1797
    assert sorted(row for part in parts for row in rows(part)) == expected
    for part in parts:
        assert part.images.dtype == torch.uint8
        assert part.images.shape == (len(part), 1, 8, 8)
        assert part.labels.dtype == torch.int64
        assert set(part.labels.tolist()) == set(range(10))
    assert splits.info == info("digits")
    assert int(splits.train.images.max()) == 255


def test_the_digits_are_split_class_by_class() -> None:
    splits = load(DataConfig(validation_fraction=0.25))
    counts = [torch.bincount(part.labels) for part in (splits.train, splits.validation, splits.test)]
    full = counts[0] + counts[1] + counts[2]
    assert torch.equal(counts[2], torch.round(full * 0.2).long())
    assert torch.equal(counts[1], torch.round((full - counts[2]) * 0.25).long())


def test_the_split_depends_on_its_own_seed_only() -> None:
    state = torch.random.get_rng_state()
    first = load(DataConfig())
    torch.manual_seed(123)
    again = load(DataConfig())
    torch.random.set_rng_state(state)
    other = load(DataConfig(split_seed=1))
    for part in ("train", "validation", "test"):
        assert getattr(first, part).digest() == getattr(again, part).digest()
    for part in ("train", "validation"):
        assert getattr(first, part).digest() != getattr(other, part).digest()


def test_no_seed_moves_test_images_into_training() -> None:
    first, second = (load(DataConfig(split_seed=seed)).test for seed in (0, 5))
    assert rows(first) == rows(second)


def test_the_test_images_do_not_depend_on_the_validation_share() -> None:
    assert load(DataConfig()).test.digest() == load(DataConfig(validation_fraction=0.5)).test.digest()


def test_train_limit_takes_a_subset_of_the_training_images() -> None:
    full, limited = load(DataConfig()), load(DataConfig(train_limit=100))
    assert len(limited.train) == 100
    assert set(rows(limited.train)) <= set(rows(full.train))
    assert limited.validation.digest() == full.validation.digest()
    assert limited.test.digest() == full.test.digest()
    assert len(set(limited.train.labels.tolist())) == 10
    assert rows(load(DataConfig(train_limit=10**6)).train) == rows(full.train)
    assert set(rows(load(DataConfig(train_limit=50)).train)) <= set(rows(limited.train))


def test_published_selection_validates_on_the_test_images() -> None:
    held_out, published = load(DataConfig()), load(DataConfig(selection="test"))
    assert published.validation.digest() == published.test.digest() == held_out.test.digest()
    assert rows(published.train) == sorted(rows(held_out.train) + rows(held_out.validation))
    assert len(load(DataConfig(selection="test", train_limit=100)).train) == 100


def test_grey_digits_are_shown_in_three_channels_and_another_size() -> None:
    splits, native = load(DataConfig(channels=3, image_size=(6, 4))), load(DataConfig())
    assert splits.info.task == TaskConfig(num_classes=10, in_channels=3, image_size=(6, 4))
    seen, labels = splits.test.floats()
    assert seen.shape == (len(native.test), 3, 6, 4)
    assert torch.equal(seen[:, 0], seen[:, 2])
    assert torch.equal(labels, native.test.labels)


def test_idx_files_are_read_as_they_are(tmp_path: Path) -> None:
    arrays = write_mnist(tmp_path)
    splits = load(mnist(tmp_path))
    assert np.array_equal(splits.test.images.squeeze(1).numpy(), arrays[FILES[2]])
    assert np.array_equal(splits.test.labels.numpy(), arrays[FILES[3]])
    assert len(splits.validation) == 10
    train = sorted((int(y), x.astype(np.uint8).tobytes()) for x, y in zip(arrays[FILES[0]], arrays[FILES[1]]))  # noqa: B905
    assert sorted(rows(splits.train) + rows(splits.validation)) == train


@pytest.mark.parametrize(("dataset", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_missing_files_are_named_with_the_way_to_fetch_them(tmp_path: Path, dataset: str, folder: str) -> None:
    with pytest.raises(MissingDataError) as caught:
        load(DataConfig(dataset=dataset, root=str(tmp_path)))
    assert str(tmp_path / folder / "raw") in str(caught.value)
    assert "--download" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 1, 3, 4, 7, 8, 15, 16, 20, 0.5, -1])
def test_a_truncated_file_is_an_input_error(tmp_path: Path, name: str, kept: float) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if kept == 0.5 else int(kept)])
    with pytest.raises(InputError) as caught:
        load(mnist(tmp_path))
    assert str(path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("magic", [0, 0x0801, 0x0803, 0x0D01, 0x0804, 0x0A03, 0x7FFFFFFF])
def test_a_file_with_another_header_is_an_input_error(tmp_path: Path, name: str, magic: int) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / name
    content = path.read_bytes()
    if content[:4] == struct.pack(">i", magic):
        pytest.skip("this is the right header")
    path.write_bytes(struct.pack(">i", magic) + content[4:])
    with pytest.raises(InputError, match="MNIST"):
        load(mnist(tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_an_input_error(tmp_path: Path, name: str) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / name).unlink()
    with pytest.raises(MissingDataError, match="delete that folder"):
        load(mnist(tmp_path))


def test_images_of_another_size_are_an_input_error(tmp_path: Path) -> None:
    write_mnist(tmp_path, side=27)
    with pytest.raises(InputError, match="shape"):
        load(mnist(tmp_path))


def test_labels_outside_the_classes_are_an_input_error(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / FILES[1]).write_bytes(idx(np.full(60, 10)))
    with pytest.raises(InputError, match="label"):
        load(mnist(tmp_path))


def test_unequal_numbers_of_images_and_labels_are_an_input_error(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / FILES[1]).write_bytes(idx(np.zeros(59)))
    with pytest.raises(InputError, match="MNIST"):
        load(mnist(tmp_path))


@pytest.mark.skipif(not (SHARED / "MNIST" / "raw").is_dir(), reason="no MNIST beside the project")
def test_the_real_mnist() -> None:
    splits = load(mnist(SHARED))
    assert len(splits.train) + len(splits.validation) == 60_000
    assert len(splits.test) == 10_000
    assert splits.test.images.shape[1:] == (1, 28, 28)
    assert splits.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    held_out = torch.bincount(splits.validation.labels) / torch.bincount(
        torch.cat([splits.train.labels, splits.validation.labels])
    )
    assert torch.allclose(held_out, torch.full((10,), 0.1), atol=1e-4)


def folders(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


def test_described_data_sets_have_names() -> None:
    assert class_names(DataConfig(), 10) == tuple("0123456789")
    with_background = class_names(DataConfig(dataset="caltech101", background=True), 102)
    assert with_background[:2] == ("BACKGROUND_Google", "Faces")
    assert class_names(DataConfig(dataset="caltech101"), 101)[0] == "Faces"


@pytest.mark.parametrize("below", ["", "train"])
def test_class_names_are_folder_names(tmp_path: Path, below: str) -> None:
    folders(tmp_path / below, "cat", "dog", ".cache")
    config = DataConfig(dataset="folder", root=str(tmp_path))
    assert class_names(config, 2) == ("cat", "dog")
    assert class_names(config, 3) == ()  # another folder by now


def test_missing_folders_have_no_class_names(tmp_path: Path) -> None:
    assert class_names(DataConfig(dataset="folder", root=str(tmp_path / "gone")), 2) == ()


def test_caltech256_class_names_have_no_numbers(tmp_path: Path) -> None:
    folders(tmp_path / "caltech256" / "256_ObjectCategories", *(f"{i:03}.thing{i}" for i in range(1, 258)))
    config = DataConfig(dataset="caltech256", root=str(tmp_path))
    assert class_names(config, 256)[-1] == "thing256"
    assert class_names(config, 257)[-1] == "thing257"
