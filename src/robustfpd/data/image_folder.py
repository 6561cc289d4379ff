"""Data sets of image files in class folders: listed, decoded once, split."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from robustfpd.config import DataConfig
from robustfpd.data.decode import decoded
from robustfpd.data.decode_cache import images_folder, kept
from robustfpd.data.described import DatasetInfo, OnProgress, Parts
from robustfpd.data.image_set import ImageSet
from robustfpd.data.progress import decoding_shown
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
    """List what `read_folder` reads."""
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
    """Decode the files, or map what was decoded before, and part them into training and test images."""
    classes = len(listing.class_names)
    described = replace(described, num_classes=classes, class_names=listing.class_names)
    seen, size = described.seen(config), described.stored_size(config)
    paths = [listing.root / file for file in listing.files]
    with decoding_shown(described.name, on_progress) as show:
        images = kept(
            images_folder(config.cache), described.name, _source(listing, paths), (len(paths), 3, *size),
            lambda: decoded(paths, size), show,
        )  # fmt: skip
    good = torch.tensor([place for place in range(len(paths)) if place not in images.bad], dtype=torch.long)
    skipped = _skip(listing, images.bad, good, config)
    whole = ImageSet(images.images, listing.labels[good], seen.in_channels, seen.image_size)
    train, test = parted(listing, good, config)
    return Parts(seen, whole.take(train), whole.take(test), skipped)


def parted(listing: Listing, good: Tensor, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Places of training and test images among the `good` ones: the data set's own parts, or drawn ones."""
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
    """What decides about the decoded pixels: every file as it is now, and the decoder."""
    import PIL

    try:
        states = [path.stat() for path in paths]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror or first_line(error)}") from None
    files = [[f, s.st_size, s.st_mtime_ns] for f, s in zip(listing.files, states, strict=True)]
    return {"files": files, "pillow": PIL.__version__}


def _skip(listing: Listing, bad: dict[int, str], good: Tensor, config: DataConfig) -> tuple[str, ...]:
    """Names of the files that are left out, warned of; an InputError where none may be, or a class is left empty."""
    if not bad:
        return ()
    names = tuple(listing.files[place] for place in sorted(bad))
    count = f"{len(bad)} of {len(listing.files)} image files in {listing.root.absolute()} cannot be decoded"
    if config.on_bad_image == "error":
        raise InputError(
            f"{count}, the first is {names[0]} ({bad[min(bad)]}); mend or delete what is broken, or leave it out with "
            "data.on_bad_image=skip"
        )
    training = good if listing.tests is None else good[~listing.tests[good]]
    left = torch.bincount(listing.labels[training], minlength=len(listing.class_names))
    if not int(left.min()):
        raise InputError(
            f"{count}, and none is left of class {listing.class_names[int(left.argmin())]!r}; mend its files"
        )
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    warnings.warn(f"{count} and were left out: {', '.join(names[:NAMED])}{more}", stacklevel=5)  # load's caller
    return names
