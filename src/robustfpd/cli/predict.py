"""`robustfpd predict`."""

from __future__ import annotations

import csv as csv_format
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from robustfpd.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from robustfpd.cli.networks import Network
    from robustfpd.cli.output import Output

UNREADABLE = 1
"""Exit code when some images could not be read."""
BATCH = 64

Row = dict[str, Any]


def predict(
    run: tyro.conf.Positional[Path],
    images: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    restored: Path | None = None,
    top: int = 1,
    trust_code: bool = False,
    csv: bool = False,
    json: bool = False,
    quiet: bool = False,
    device: str = "auto",
) -> None:
    """Classify images: class, confidence, and how much restoration changed each.

    For example `robustfpd predict digits/mini-fpd photo.png scans/`,
    or `robustfpd predict runs/folder-mini 'shots/**/*.jpg' --top 3 --restored cleaned --csv > answers.csv`.

    Images become what the run's data set made of its own: turned upright, resized until they cover the network's size,
    the centre cropped, transparency dropped. A network for grey images sees the luminance; one that learned white
    digits on black must be shown such. Of an animation the first frame is taken.

    Confidence is the softmax of the logits; before the tanh where the head squashes them, because after it ten classes
    never exceed 45 %. It is what the network believes of clean images, and no measure of robustness.

    Ends with 1 when some images could not be read (their rows say why), with 2 when nothing could be begun.

    Args:
        run: a run's folder, a network that comes with robustfpd (see `robustfpd models`), or a folder that model.save
            wrote.
        images: files, folders (with all folders below), and quoted patterns such as 'shots/**/*.jpg'.
        restored: folder for the restored images, as PNG.
        top: how many classes to tell for each image, most likely first.
        trust_code: import and run the module that the run's network is made by (model.backbone=package.module:factory);
            only for runs of your own.
        csv: write comma-separated values, a row for each image as soon as it is known.
        json: write one JSON object.
        quiet: say nothing; the exit code and the restored images tell.
        device: auto, cpu, cuda or mps.
    """
    if csv and json:
        raise InputError("--csv and --json exclude each other; choose one")
    if top < 1:
        raise InputError(f"--top must be at least 1, found {top}")
    if not images:
        raise InputError("name at least one image, folder or pattern after the run")
    if restored is not None and restored.exists() and not restored.is_dir():
        raise InputError(f"--restored {restored} is a file; give a folder")
    from robustfpd.cli.networks import network
    from robustfpd.cli.output import Output
    from robustfpd.device import resolve_device

    output = Output(json=json, quiet=quiet or csv)
    found = network(run, trust_code)
    _check(found, restored)
    found.model.to(resolve_device(device))
    rows = _rows(found, images, restored, top, output)
    if csv and not quiet:
        rows = _as_csv(rows, top)
    kept = list(rows)
    failed = sum(bool(row["error"]) for row in kept)
    output.result({"model": found.name, "images": kept, "unreadable": failed})
    _show(output, kept, found, failed, restored)
    if failed:
        raise SystemExit(UNREADABLE)


def _check(found: Network, restored: Path | None) -> None:
    from robustfpd.models import FPD

    if restored is not None and not isinstance(found.model, FPD):
        raise InputError(f"{found.name} is a plain network and restores nothing; leave out --restored")
    channels = found.model.task.in_channels
    if channels not in (1, 3):
        raise InputError(f"{found.name} takes images of {channels} channels; image files have 1 or 3")


def _rows(
    found: Network, images: Sequence[str], restored: Path | None, top: int, output: Output
) -> Iterator[Row]:  # fmt: skip
    """A row for each image, in order; memory holds one batch of images."""
    from robustfpd.data.image_files import named, read

    files = named(images)
    task, config = found.model.task, found.data
    stored = task.image_size if config is None or config.stored_size is None else config.stored_size
    names = None if restored is None else _Names(restored, [file.path for file in files])
    with output.console.status(f"{found.name}: {len(files)} images") as status:
        for start in range(0, len(files), BATCH):
            status.update(f"{found.name}: {start} of {len(files)} images")
            batch = files[start : start + BATCH]
            pictures = iter(read([file.path for file in batch if not file.problem], stored, task.in_channels))
            seen = [file.problem or next(pictures) for file in batch]
            answers = iter(_answers(found, [s.pixels for s in seen if not isinstance(s, str)], top))
            for file, what in zip(batch, seen, strict=True):
                row: Row = {"image": _shown(file.path), "class": None, "index": None, "confidence": None}
                row |= {"top": [], "change_rms": None, "change_mean": None, "restored": None, "note": "", "error": ""}
                if isinstance(what, str):
                    yield row | {"error": what}
                    continue
                answer, picture = next(answers)
                if names is not None and picture is not None and not answer["error"]:
                    answer["restored"] = _shown(_write(picture, names.of(file.path)))
                yield row | {"note": ", ".join(what.notes)} | answer


def _answers(found: Network, pixels: Sequence[Any], top: int) -> Iterator[tuple[Row, Tensor | None]]:
    """What the network says of each image, and the restored image."""
    import numpy as np
    import torch

    from robustfpd.data.image_set import as_seen
    from robustfpd.models.predict import predict as predicted

    if not pixels:
        return
    task, device = found.model.task, found.model.mean.device
    seen = as_seen(torch.from_numpy(np.stack(pixels)), task.in_channels, task.image_size)
    said = predicted(found.model, seen.to(device))
    best, classes = said.probabilities.topk(min(top, task.num_classes), dim=1)
    for place in range(len(pixels)):
        if not bool(best[place].isfinite().all()):
            yield {"error": "the network answers NaN"}, None
            continue
        likely = [
            {"class": found.class_name(index), "index": index, "confidence": confidence}
            for index, confidence in zip(classes[place].tolist(), best[place].tolist(), strict=True)
        ]
        row: Row = {**likely[0], "top": likely, "error": ""}
        if said.restored is None or said.change_rms is None or said.change_mean is None:
            yield row, None
            continue
        row |= {"change_rms": float(said.change_rms[place]), "change_mean": float(said.change_mean[place])}
        yield row, said.restored[place].cpu()


class _Names:
    """Files for restored images, each its own: images of one name lie in different folders, and stay as they are."""

    def __init__(self, folder: Path, images: Sequence[Path]) -> None:
        self.folder = folder
        self.taken = {path.resolve() for path in images}

    def of(self, image: Path) -> Path:
        """`photo-restored.png`, or `photo-restored-2.png` where that is taken."""
        number, path = 1, self.folder / f"{image.stem}-restored.png"
        while path.resolve() in self.taken:
            number += 1
            path = self.folder / f"{image.stem}-restored-{number}.png"
        self.taken.add(path.resolve())
        return path


def _write(picture: torch.Tensor, path: Path) -> Path:
    """Write an image C×H×W in [0, 1] as PNG."""
    from PIL import Image

    values = (255 * picture).round().byte().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0)).save(path)
    return path


def _as_csv(rows: Iterator[Row], top: int) -> Iterator[Row]:
    """Write each row as it comes, and pass it on."""
    columns = ["image", "class", "index", "confidence", "change_rms", "change_mean", "restored", "note", "error"]
    more = [f"{name}_{place}" for place in range(2, top + 1) for name in ("class", "index", "confidence")]
    writer = csv_format.DictWriter(sys.stdout, [*columns[:4], *more, *columns[4:]], extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        others = {f"{key}_{place}": v for place, one in enumerate(row["top"][1:], 2) for key, v in one.items()}
        writer.writerow({key: _short(value) for key, value in {**row, **others}.items()})
        sys.stdout.flush()
        yield row


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _show(output: Output, rows: Sequence[Row], found: Network, failed: int, restored: Path | None) -> None:
    """The same as a table, for people."""
    from rich.table import Table
    from rich.text import Text

    table = Table("image", "class", box=None, pad_edge=False, show_edge=False)
    table.add_column("confidence", justify="right")
    changed = any(row["change_rms"] is not None for row in rows)
    if changed:
        table.add_column("changed by", justify="right")
    for row in rows:
        note = f" ({row['note']})" if row["note"] else ""
        if row["restored"] and Path(row["restored"]).stem != f"{Path(row['image']).stem}-restored":
            note += f" → {Path(row['restored']).name}"  # another image of that name came first
        cells = [Text(row["image"] + note, overflow="fold")]
        if row["error"]:
            cells[0].append(f"\n  {row['error']}", style="red")
            cells += [Text("not read")]
        else:
            cells += [Text("\n".join(one["class"] for one in row["top"]))]
            cells += [Text("\n".join(f"{100 * one['confidence']:.1f} %" for one in row["top"]))]
            cells += [Text(f"{row['change_rms']:.1f}")] if changed else []
        table.add_row(*cells)
    output.say(table)
    if changed:
        output.say("changed by: RMS distance of the restored image, in grey levels of 0 to 255")
    if not found.class_names:
        output.say("classes are numbers: nothing tells their names")
    written = sum(row["restored"] is not None for row in rows)
    if written:
        output.say(f"wrote {written} restored images into {restored}")
    if failed:
        output.say(f"{failed} of {len(rows)} could not be read")


def _shown(path: Path) -> str:
    """A path that can be printed whatever bytes it is made of."""
    return os.fsencode(path).decode(errors="replace")
