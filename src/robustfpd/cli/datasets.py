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
        output: text and tables, one JSON object, or nothing.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from robustfpd.cli.common import program
    from robustfpd.data.datasets import inventory
    from robustfpd.data.decode_cache import images_folder

    found = inventory(data_root, cache)
    table = Table(
        "data set", "there", "where", "images", "classes", "on disk", "decoded", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for column in table.columns[3:]:
        column.justify = "right"
    for each in found:
        table.add_row(*_row(each))
    lines = [f"looked in {data_root.absolute()}; decoded images are kept in {images_folder(cache).absolute()}"]
    missing = [each for each in found if not each.there and each.info.download]
    lines += ["to download those that are missing:"] if missing else []
    lines += [f"  {_download_command(program(), each, data_root)}" for each in missing]
    lines += [
        "images of your own, a folder for each class:",
        f"  {program()} train folder/mini --data-root FOLDER",
    ]
    output.print(table, *lines)
    output.print_result({"data_root": str(data_root), "datasets": [_values(each, data_root) for each in found]})


def _values(found: LocalDataset, data_root: Path) -> dict[str, object]:
    """Return a data set for the JSON result; sizes are bytes."""
    from robustfpd.cli.common import program

    described = found.info
    return {
        "name": described.name, "description": described.description, "there": found.there, "images": found.images,
        "classes": found.classes, "image_size": list(described.image_size), "channels": described.in_channels,
        "bytes": found.size, "cached_bytes": found.cached,
        "fetch": _download_command(program(), found, data_root) if described.download and not found.there else None,
    }  # fmt: skip


def _row(found: LocalDataset) -> tuple[str, ...]:
    """Return a row of the table."""
    described = found.info
    where = described.files[0].partition("/")[0] if described.files else ""
    if described.name == "digits":
        where = "scikit-learn"
    if described.name == "folder":
        return "folder", "", "anywhere", "", "", "", _size(found.cached)
    count = f"{found.images:,}" if found.images is not None else described.description.partition(" ")[0]
    return (
        described.name, "yes" if found.there else "no", where, count, str(found.classes), _size(found.size),
        _size(found.cached),
    )  # fmt: skip


def _download_command(program: str, found: LocalDataset, data_root: Path) -> str:
    """Return the command that downloads a data set and trains on it."""
    from robustfpd.config import recipe, recipe_names

    name = found.info.name
    fitting = sorted((r for r in recipe_names() if recipe(r).data.dataset == name), key=lambda r: "mini" not in r)
    words = [fitting[0]] if fitting else ["digits/mini", f"data.dataset={name}"]
    command = shlex.join([program, "train", *words, "--data-root", str(data_root), "--download"])
    return f"{command}   # {found.info.download}"


def _size(count: int) -> str:
    """Return bytes in MB or GB; nothing for none."""
    if not count:
        return ""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count / 1e6, 0.1):.1f} MB"
