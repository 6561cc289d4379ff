"""What the classes of a data set are called, told without reading its images."""

from __future__ import annotations

from pathlib import Path

from robustfpd.config import DataConfig
from robustfpd.data.caltech import ARCHIVE_256, BACKGROUND_101
from robustfpd.data.datasets import info
from robustfpd.data.image_folder import class_folders


def class_names(config: DataConfig, num_classes: int) -> tuple[str, ...]:
    """Names in the order of the labels; empty where neither the data set's description nor its folders tell them.

    Folders that hold another number of classes than the network knows tell nothing.
    """
    names = info(config.dataset).class_names
    if config.dataset == "caltech101" and config.background:
        names = (BACKGROUND_101, *names)
    if not names:
        root = Path(config.root).expanduser()
        root = root / ARCHIVE_256.folder if config.dataset == "caltech256" else root
        names = _in(root / "train") or _in(root)
        if config.dataset == "caltech256":  # the folder of clutter comes last
            names = tuple(name.partition(".")[2] or name for name in names)[:num_classes]
    return names if len(names) == num_classes else ()


def _in(root: Path) -> tuple[str, ...]:
    try:
        return class_folders(root) if root.is_dir() else ()
    except OSError:
        return ()
