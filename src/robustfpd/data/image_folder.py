"""Data sets of image files in class folders, CALTECH-101 and CALTECH-256 among them: listed, decoded once, split."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from robustfpd.config import DataConfig
from robustfpd.data.decode_cache import OnProgress, cached_images, decoding_progress, images_folder
from robustfpd.data.download import Archive, archive_folder
from robustfpd.data.image_files import decoded
from robustfpd.data.image_set import DatasetInfo, ImageSet, Parts
from robustfpd.data.splits import train_and_test
from robustfpd.errors import InputError, MissingDataError, first_line

TEST_FOLDERS = ("test", "val", "validation")
"""Folders beside `train` that hold the test set, the first that is there."""
NAMED = 3
"""Bad files named in a warning."""


@dataclass(frozen=True)
class Listing:
    """Image files below a folder, in the order of classes and names."""

    root: Path
    files: tuple[str, ...]
    """Paths below the root, with slashes."""
    labels: Tensor
    class_names: tuple[str, ...]
    tests: Tensor | None = None
    """Which files are the test set; None where the data set has none of its own."""


def read_folder(described: DatasetInfo, config: DataConfig, on_progress: OnProgress | None) -> Parts:
    """Read `root/<class>/*`, or `root/train/<class>/*` with a test set beside it."""
    return parts(folder_listing(described, config), described, config, on_progress)


def folder_listing(described: DatasetInfo, config: DataConfig) -> Listing:
    """List the images of `read_folder`."""
    root = Path(config.root).expanduser()
    if not root.is_dir():
        raise MissingDataError(
            f"no folder {root.absolute()}; give the one that holds a folder of images per class as --data-root"
        )
    train = root / "train"
    if not train.is_dir() or not class_folders(train):
        return listed(root, class_folders(root))
    listing = listed(root, class_folders(train), below="train/")
    test = next((name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if test is None:
        return listing
    unknown = sorted(set(class_folders(root / test)) - set(listing.class_names))
    if unknown:
        raise InputError(f"{root / test} has a class {unknown[0]!r} that {train} has not; both need the same classes")
    return _with_tests(listing, listed(root, listing.class_names, f"{test}/", True))


def class_folders(root: Path) -> tuple[str, ...]:
    """Names of the folders in `root`, sorted; hidden ones are not classes."""
    return tuple(sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")))


def listed(root: Path, class_names: Sequence[str], below: str = "", may_lack: bool = False) -> Listing:
    """List the images of `class_names` in `root/below`, in ImageFolder's order.

    Raises:
        InputError: fewer than two classes, or (unless `may_lack`) a class without images.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    folder = root / below
    if len(class_names) < 2:
        raise InputError(
            f"{folder.absolute()} must hold a folder of images for each of at least two classes, found "
            f"{len(class_names)}"
        )
    numbers = {name: number for number, name in enumerate(class_names)}
    found = make_dataset(str(folder), numbers, IMG_EXTENSIONS, allow_empty=True)
    labels = torch.tensor([label for _, label in found], dtype=torch.long)
    counts = torch.bincount(labels, minlength=len(class_names))
    if not may_lack and not int(counts.min()):
        raise InputError(
            f"{folder / class_names[int(counts.argmin())]} has no image files; add some ({', '.join(IMG_EXTENSIONS)}) "
            "or delete the folder"
        )
    files = tuple(Path(path).relative_to(root).as_posix() for path, _ in found)
    return Listing(root, files, labels, tuple(class_names))


def parts(listing: Listing, described: DatasetInfo, config: DataConfig, on_progress: OnProgress | None) -> Parts:
    """Decode the files, or map them from the cache, and split them into training and test images."""
    classes = len(listing.class_names)
    described = replace(described, num_classes=classes, class_names=listing.class_names)
    seen, size = described.seen(config), described.stored_size(config)
    paths = [listing.root / file for file in listing.files]
    with decoding_progress(described.name, on_progress) as show:
        images = cached_images(
            images_folder(config.cache), described.name, _source(listing, paths), (len(paths), 3, *size),
            lambda: decoded(paths, size), show,
        )  # fmt: skip
    good = torch.tensor([place for place in range(len(paths)) if place not in images.bad], dtype=torch.long)
    skipped = _skip(listing, images.bad, good, config)
    whole = ImageSet(images.images, listing.labels[good], seen.in_channels, seen.image_size)
    train, test = split_listing(listing, good, config)
    return Parts(seen, whole.take(train), whole.take(test), skipped)


def split_listing(listing: Listing, good: Tensor, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Return indices of training and test images into `good`: the data set's own split, or a drawn one."""
    if listing.tests is None:
        return train_and_test(listing.labels[good], listing.class_names, config)
    tests = listing.tests[good]
    return torch.nonzero(~tests).flatten(), torch.nonzero(tests).flatten()


def _with_tests(train: Listing, test: Listing) -> Listing:
    if not test.files:
        raise InputError(f"the test folder in {train.root.absolute()} has no image files; add some, or delete it")
    tests = torch.arange(len(train.files) + len(test.files)) >= len(train.files)
    return replace(
        train, files=train.files + test.files, labels=torch.cat([train.labels, test.labels]), tests=tests
    )  # fmt: skip


def _source(listing: Listing, paths: Sequence[Path]) -> dict[str, object]:
    """Return what determines the decoded pixels: name, size and time of every file, and Pillow's version."""
    import PIL

    try:
        states = [path.stat() for path in paths]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror or first_line(error)}") from None
    files = [[f, s.st_size, s.st_mtime_ns] for f, s in zip(listing.files, states, strict=True)]
    return {"files": files, "pillow": PIL.__version__}


def _skip(listing: Listing, bad: dict[int, str], good: Tensor, config: DataConfig) -> tuple[str, ...]:
    """Return the files left out, with a warning; an InputError if none may be, or if a class becomes empty."""
    if not bad:
        return ()
    names = tuple(listing.files[place] for place in sorted(bad))
    count = f"{len(bad)} of {len(listing.files)} image files in {listing.root.absolute()} cannot be decoded"
    if config.on_bad_image == "error":
        raise InputError(
            f"{count}, the first is {names[0]} ({bad[min(bad)]}); fix or delete the bad files, or leave them out with "
            "data.on_bad_image=skip"
        )
    training = good if listing.tests is None else good[~listing.tests[good]]
    left = torch.bincount(listing.labels[training], minlength=len(listing.class_names))
    if not int(left.min()):
        raise InputError(
            f"{count}, and none is left of class {listing.class_names[int(left.argmin())]!r}; fix its files"
        )
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    warnings.warn(f"{count} and were left out: {', '.join(names[:NAMED])}{more}", stacklevel=5)  # load's caller
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
"""Their folders are `001.ak47` and so on; one more, `257.clutter`, is the background."""

ARCHIVE_101 = Archive(
    "Caltech101",
    "caltech101/101_ObjectCategories",
    ("caltech-101.zip", "caltech-101", "101_ObjectCategories.tar.gz"),
    9144,
)
ARCHIVE_256 = Archive("Caltech256", "caltech256/256_ObjectCategories", ("256_ObjectCategories.tar",), 30607)
ARCHIVES = {"caltech101": ARCHIVE_101, "caltech256": ARCHIVE_256}


def read_caltech101(described: DatasetInfo, config: DataConfig, on_progress: OnProgress | None) -> Parts:
    """Read the images of `caltech101_listing`."""
    return parts(caltech101_listing(described, config), described, config, on_progress)


def caltech101_listing(described: DatasetInfo, config: DataConfig) -> Listing:
    """List CALTECH-101; with `config.background` (published) the background folder is one more class."""
    folder = archive_folder(ARCHIVE_101, described, config)
    expected = (BACKGROUND_101, *CLASSES_101) if config.background else CLASSES_101
    found = set(class_folders(folder))
    lacking = [name for name in expected if name not in found]
    strange = sorted(found - {BACKGROUND_101, *CLASSES_101})
    _check(described, folder, lacking, strange, len(expected))
    return listed(folder, expected)


def read_caltech256(described: DatasetInfo, config: DataConfig, on_progress: OnProgress | None) -> Parts:
    """Read the images of `caltech256_listing`."""
    return parts(caltech256_listing(described, config), described, config, on_progress)


def caltech256_listing(described: DatasetInfo, config: DataConfig) -> Listing:
    """List CALTECH-256; with `config.background` (published) the clutter folder is one more class."""
    folder = archive_folder(ARCHIVE_256, described, config)
    count = CLASSES_256 + config.background
    numbered = {name.partition(".")[0]: name for name in class_folders(folder)}
    expected = [f"{number:03}" for number in range(1, CLASSES_256 + 2)]
    lacking = [f"{number}.*" for number in expected[:count] if number not in numbered]
    strange = [name for name in class_folders(folder) if name not in {numbered.get(number) for number in expected}]
    _check(described, folder, lacking, strange, count)
    return listed(folder, [numbered[number] for number in expected[:count]])


def _check(described: DatasetInfo, folder: Path, lacking: list[str], strange: list[str], count: int) -> None:
    """Check the class folders: a missing or additional one would shift the labels of the others."""
    other = f"for classes of your own take data.dataset=folder with --data-root {folder.absolute()}"
    if lacking:
        raise InputError(
            f"{described.name} in {folder.absolute()} has {count - len(lacking)} of {count} class folders, the first "
            f"missing is {lacking[0]}; delete {folder.name} and add --download to fetch it anew, or {other}"
        )
    if strange:
        raise InputError(
            f"{described.name} in {folder.absolute()} has a folder that is none of its classes, {strange[0]}; "
            f"move it away, or {other}"
        )
