"""`robustfpd datasets`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from robustfpd.cli.common import Output

if TYPE_CHECKING:
    from robustfpd.data.datasets import LocalDataset


def datasets(
    data_root: Path = Path("data"), cache: Path | None = None, output: Output = Output()  # noqa: B008
) -> None:  # fmt: skip
    """List the data sets, their images and classes, and how to download the missing ones.

    For example `robustfpd datasets`, or `robustfpd datasets --data-root /data`.

    Args:
        data_root: folder where torchvision keeps its data sets.
        cache: folder for decoded images; default ROBUSTFPD_CACHE, else the user's cache folder.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from robustfpd.cli.common import program
    from robustfpd.data.datasets import inventory
    from robustfpd.data.decode_cache import images_folder

    inventoried = inventory(data_root, cache)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("data set", "there", "where", "images", "classes", "on disk", "decoded"):
        table.add_column(heading, justify="left" if heading in ("data set", "there", "where") else "right")
    for each in inventoried:
        table.add_row(*_row(each))
    missing = [each for each in inventoried if not each.there and each.info.download]
    commands = {each.info.name: _download_command(program(), each, data_root) for each in missing}
    output.print(
        table,
        f"looked in {data_root.absolute()}; decoded images are kept in {images_folder(cache).absolute()}",
        *(["to download those that are missing:"] if missing else []),
        *(f"  {command}" for command in commands.values()),
        "images of your own, a folder for each class:",
        f"  {program()} train folder/mini --data-root FOLDER",
    )
    values = [
        {
            "name": each.info.name, "description": each.info.description, "there": each.there, "images": each.images,
            "classes": each.classes, "image_size": list(each.info.image_size), "channels": each.info.in_channels,
            "bytes": each.size, "cached_bytes": each.cached, "fetch": commands.get(each.info.name),
        }
        for each in inventoried
    ]  # fmt: skip
    output.print_result({"data_root": str(data_root), "datasets": values})


def _row(found: LocalDataset) -> tuple[str, ...]:
    """Return a row of the table."""
    described = found.info
    if described.name == "folder":
        return "folder", "", "anywhere", "", "", "", _size(found.cached)
    where = described.files[0].partition("/")[0] if described.files else "scikit-learn"
    count = f"{found.images:,}" if found.images is not None else described.description.partition(" ")[0]
    return (
        described.name, "yes" if found.there else "no", where, count, str(found.classes), _size(found.size),
        _size(found.cached),
    )  # fmt: skip


def _download_command(program: str, found: LocalDataset, data_root: Path) -> str:
    """Return the command that downloads a data set and trains on it."""
    from robustfpd.config import recipe_names

    name = found.info.name
    words = [f"{name}/mini"] if f"{name}/mini" in recipe_names() else ["digits/mini", f"data.dataset={name}"]
    command = shlex.join([program, "train", *words, "--data-root", str(data_root), "--download"])
    return f"{command}   # {found.info.download}"


def _size(count: int) -> str:
    """Return bytes in MB or GB; nothing for none."""
    if not count:
        return ""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count / 1e6, 0.1):.1f} MB"
