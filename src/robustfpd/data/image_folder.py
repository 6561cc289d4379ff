"""Data sets of image files in class folders, CALTECH-101 and CALTECH-256 among them: listed, decoded once, split."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from robustfpd.config import DataConfig
from robustfpd.data.decode_cache import OnProgress, cached_images, decoding_progress, images_folder
from robustfpd.data.download import Archive, archive_folder
from robustfpd.data.image_files import decode_pixels
from robustfpd.data.image_set import DatasetInfo, ImageSet, Parts
from robustfpd.data.splits import train_and_test
from robustfpd.errors import InputError, MissingDataError, first_line

NAMED = 3
"""Number of bad files that a warning names."""


@dataclass(frozen=True)
class Listing:
    """Image files below a folder, ordered by class and name."""

    root: Path
    files: tuple[str, ...]
    """Paths below the root, with slashes."""
    labels: Tensor
    class_names: tuple[str, ...]
    is_test: Tensor | None = None
    """Mask of the test images; None if the data set has no test set."""


def folder_listing(dataset: DatasetInfo, config: DataConfig) -> Listing:
    """List `root/<class>/*`, or `root/train/<class>/*` with a test set beside it."""
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise MissingDataError(
            f"no folder {root.absolute()}; give the one that holds a folder of images per class as --data-root"
        )
    train = root / "train"
    if not train.is_dir() or not class_folders(train):
        return list_images(root, class_folders(root))
    listing = list_images(root, class_folders(train), "train/")
    test = next((name for name in ("test", "val", "validation") if (root / name).is_dir()), None)
    if test is None:
        return listing
    unknown = sorted(set(class_folders(root / test)) - set(listing.class_names))
    if unknown:
        raise InputError(f"{root / test} has a class {unknown[0]!r} that {train} lacks; both need the same classes")
    tests = list_images(root, listing.class_names, f"{test}/", allow_empty=True)
    if not tests.files:
        raise InputError(f"the test folder in {root.absolute()} has no image files; add some, or delete it")
    files, labels = listing.files + tests.files, torch.cat([listing.labels, tests.labels])
    return replace(listing, files=files, labels=labels, is_test=torch.arange(len(files)) >= len(listing.files))


def class_folders(root: Path) -> tuple[str, ...]:
    """Return the sorted names of the folders in `root` that are not hidden."""
    return tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))


def list_images(root: Path, class_names: Sequence[str], below: str = "", *, allow_empty: bool = False) -> Listing:
    """List the images of `class_names` in `root/below`, in ImageFolder's order.

    Raises:
        InputError: fewer than two classes, or (unless `allow_empty`) a class without images.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    folder, num_classes = root / below, len(class_names)
    if num_classes < 2:
        raise InputError(
            f"{folder.absolute()} must hold a folder of images for each of at least two classes, found {num_classes}"
        )
    indices = {name: index for index, name in enumerate(class_names)}
    samples = make_dataset(str(folder), indices, IMG_EXTENSIONS, allow_empty=True)
    labels = torch.tensor([label for _, label in samples], dtype=torch.long)
    counts = torch.bincount(labels, minlength=num_classes)
    if not allow_empty and not int(counts.min()):
        raise InputError(
            f"{folder / class_names[int(counts.argmin())]} has no image files; add some ({', '.join(IMG_EXTENSIONS)}) "
            "or delete the folder"
        )
    files = tuple(Path(path).relative_to(root).as_posix() for path, _ in samples)
    return Listing(root, files, labels, tuple(class_names))


def read_images(listing: Listing, dataset: DatasetInfo, config: DataConfig, on_progress: OnProgress | None) -> Parts:
    """Decode the files, or map them from the cache, and split them into training and test images."""
    dataset = replace(dataset, num_classes=len(listing.class_names), class_names=listing.class_names)
    seen, size = dataset.seen(config), dataset.stored_size(config)
    paths = [listing.root / file for file in listing.files]
    with decoding_progress(dataset.name, on_progress) as show:
        cached = cached_images(
            images_folder(config.cache), dataset.name, _source(listing, paths), (len(paths), 3, *size),
            lambda: decode_pixels(paths, size), show,
        )  # fmt: skip
    good = torch.tensor([index for index in range(len(paths)) if index not in cached.bad], dtype=torch.long)
    skipped = _skip(listing, cached.bad, good, config)
    images = ImageSet(cached.images, listing.labels[good], seen.in_channels, seen.image_size)
    train, test = split_listing(listing, good, config)
    return Parts(seen, images.take(train), images.take(test), skipped)


def split_listing(listing: Listing, good: Tensor, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Return indices of training and test images into `good`: the data set's own split, or a drawn one."""
    if listing.is_test is None:
        return train_and_test(listing.labels[good], listing.class_names, config)
    is_test = listing.is_test[good]
    return torch.nonzero(~is_test).flatten(), torch.nonzero(is_test).flatten()


def _source(listing: Listing, paths: Sequence[Path]) -> dict[str, object]:
    """Return the part of the cache key: name, size and time of every file, and Pillow's version."""
    import PIL

    try:
        stats = [path.stat() for path in paths]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror or first_line(error)}") from None
    files = [[f, s.st_size, s.st_mtime_ns] for f, s in zip(listing.files, stats, strict=True)]
    return {"files": files, "pillow": PIL.__version__}


def _skip(listing: Listing, bad: dict[int, str], good: Tensor, config: DataConfig) -> tuple[str, ...]:
    """Return the bad files, with a warning; raise an InputError if they may not be skipped or a class becomes empty."""
    if not bad:
        return ()
    names = tuple(listing.files[index] for index in sorted(bad))
    count = f"{len(bad)} of {len(listing.files)} image files in {listing.root.absolute()} cannot be decoded"
    if config.on_bad_image == "error":
        raise InputError(
            f"{count}, the first is {names[0]} ({bad[min(bad)]}); fix or delete the bad files, or leave them out with "
            "data.on_bad_image=skip"
        )
    training = good if listing.is_test is None else good[~listing.is_test[good]]
    counts = torch.bincount(listing.labels[training], minlength=len(listing.class_names))
    if not int(counts.min()):
        name = listing.class_names[int(counts.argmin())]
        raise InputError(f"{count}, and none is left of class {name!r}; fix its files")
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    warnings.warn(f"{count} and were left out: {', '.join(names[:NAMED])}{more}", stacklevel=4)  # the caller of load
    return names


CLASSES_101 = tuple(
    """
    Faces Faces_easy Leopards Motorbikes accordion airplanes anchor ant barrel bass beaver binocular bonsai brain
    brontosaurus buddha butterfly camera cannon car_side ceiling_fan cellphone chair chandelier cougar_body
    cougar_face crab crayfish crocodile crocodile_head cup dalmatian dollar_bill dolphin dragonfly electric_guitar
    elephant emu euphonium ewer ferry flamingo flamingo_head garfield gerenuk gramophone grand_piano hawksbill
    headphone hedgehog helicopter ibis inline_skate joshua_tree kangaroo ketch lamp laptop llama lobster lotus
    mandolin mayfly menorah metronome minaret nautilus octopus okapi pagoda panda pigeon pizza platypus pyramid
    revolver rhino rooster saxophone schooner scissors scorpion sea_horse snoopy soccer_ball stapler starfish
    stegosaurus stop_sign strawberry sunflower tick trilobite umbrella watch water_lilly wheelchair wild_cat
    windsor_chair wrench yin_yang
    """.split()  # noqa: SIM905
)
BACKGROUND_101 = "BACKGROUND_Google"
CLASSES_256 = 256
"""Number of classes with folders `001.ak47` to `256.toad`; `257.clutter` is the background."""

ARCHIVE_101 = Archive(
    "Caltech101", "caltech101/101_ObjectCategories",
    ("caltech-101.zip", "caltech-101", "101_ObjectCategories.tar.gz"), 9144,
)  # fmt: skip
ARCHIVE_256 = Archive("Caltech256", "caltech256/256_ObjectCategories", ("256_ObjectCategories.tar",), 30607)
ARCHIVES = {"caltech101": ARCHIVE_101, "caltech256": ARCHIVE_256}


def caltech101_listing(dataset: DatasetInfo, config: DataConfig) -> Listing:
    """List CALTECH-101; with `config.background` (published) the background folder is one more class."""
    folder = archive_folder(ARCHIVE_101, dataset, config)
    expected = (BACKGROUND_101, *CLASSES_101) if config.background else CLASSES_101
    existing = set(class_folders(folder))
    missing = [name for name in expected if name not in existing]
    unknown = sorted(existing - {BACKGROUND_101, *CLASSES_101})
    _check(dataset, folder, missing, unknown, len(expected))
    return list_images(folder, expected)


def caltech256_listing(dataset: DatasetInfo, config: DataConfig) -> Listing:
    """List CALTECH-256; with `config.background` (published) the clutter folder is one more class."""
    folder = archive_folder(ARCHIVE_256, dataset, config)
    count = CLASSES_256 + config.background
    numbered = {name.partition(".")[0]: name for name in class_folders(folder)}
    expected = [f"{number:03}" for number in range(1, CLASSES_256 + 2)]
    missing = [f"{number}.*" for number in expected[:count] if number not in numbered]
    unknown = [name for name in class_folders(folder) if name not in {numbered.get(number) for number in expected}]
    _check(dataset, folder, missing, unknown, count)
    return list_images(folder, [numbered[number] for number in expected[:count]])


def _check(dataset: DatasetInfo, folder: Path, missing: list[str], unknown: list[str], count: int) -> None:
    """Check the class folders: a missing or additional one would shift the labels of the others."""
    other = f"for classes of your own use data.dataset=folder with --data-root {folder.absolute()}"
    if missing:
        raise InputError(
            f"{dataset.name} in {folder.absolute()} has {count - len(missing)} of {count} class folders, the first "
            f"missing is {missing[0]}; delete {folder.name} and add --download to download it again, or {other}"
        )
    if unknown:
        raise InputError(
            f"{dataset.name} in {folder.absolute()} has a folder that is none of its classes, {unknown[0]}; "
            f"move it away, or {other}"
        )


LISTINGS: dict[str, Callable[[DatasetInfo, DataConfig], Listing]] = {
    "caltech101": caltech101_listing, "caltech256": caltech256_listing, "folder": folder_listing,
}  # fmt: skip
