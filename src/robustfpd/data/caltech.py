"""CALTECH-101 and CALTECH-256: class folders of photographs without a test set of their own."""

from __future__ import annotations

from pathlib import Path

from robustfpd.config import DataConfig
from robustfpd.data.described import DatasetInfo, OnProgress, Parts
from robustfpd.data.download import Archive, unpacked
from robustfpd.data.image_folder import Listing, class_folders, listed, parts
from robustfpd.errors import InputError

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
    """Read what `caltech101_listing` lists."""
    return parts(caltech101_listing(described, config), described, config, on_progress)


def caltech101_listing(described: DatasetInfo, config: DataConfig) -> Listing:
    """List CALTECH-101, as published with the background's folder as one more class, or without."""
    folder = unpacked(ARCHIVE_101, described, config)
    expected = (BACKGROUND_101, *CLASSES_101) if config.background else CLASSES_101
    found = set(class_folders(folder))
    lacking = [name for name in expected if name not in found]
    strange = sorted(found - {BACKGROUND_101, *CLASSES_101})
    _check(described, folder, lacking, strange, len(expected))
    return listed(folder, expected)


def read_caltech256(described: DatasetInfo, config: DataConfig, on_progress: OnProgress | None) -> Parts:
    """Read what `caltech256_listing` lists."""
    return parts(caltech256_listing(described, config), described, config, on_progress)


def caltech256_listing(described: DatasetInfo, config: DataConfig) -> Listing:
    """List CALTECH-256, as published with the folder of clutter as one more class, or without."""
    folder = unpacked(ARCHIVE_256, described, config)
    count = CLASSES_256 + config.background
    numbered = {name.partition(".")[0]: name for name in class_folders(folder)}
    expected = [f"{number:03}" for number in range(1, CLASSES_256 + 2)]
    lacking = [f"{number}.*" for number in expected[:count] if number not in numbered]
    strange = [name for name in class_folders(folder) if name not in {numbered.get(number) for number in expected}]
    _check(described, folder, lacking, strange, count)
    return listed(folder, [numbered[number] for number in expected[:count]])


def _check(described: DatasetInfo, folder: Path, lacking: list[str], strange: list[str], count: int) -> None:
    """Labels follow from the folders, so that one too few or too many would change what every other class means."""
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
