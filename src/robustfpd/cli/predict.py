"""`robustfpd predict`."""

from __future__ import annotations

import csv as csv_format
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from robustfpd.cli.common import RUN, DeviceFlag, Output, TrustFlag
from robustfpd.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from robustfpd.models import FPD, Baseline
    from robustfpd.report.paths import Target

BATCH = 64

Row = dict[str, Any]


def predict(
    run: Annotated[tyro.conf.Positional[Path], RUN],
    images: tyro.conf.Positional[tuple[str, ...]] = (),
    /,
    restored: Path | None = None,
    top: int = 1,
    trust_code: TrustFlag = False,
    csv: bool = False,
    output: Output = Output(),  # noqa: B008
    device: DeviceFlag = "auto",
) -> None:
    """Classify images; print the class, the confidence, and how much restoration changed each image.

    For example `robustfpd predict digits/mini-fpd photo.png scans/`,
    or `robustfpd predict runs/folder-mini 'shots/**/*.jpg' --top 3 --restored cleaned --csv > predictions.csv`.

    Images are preprocessed as in training: rotated according to their EXIF data, resized until they cover the network's
    size, centre-cropped, without transparency. A network for grey images gets the luminance; one trained on white
    digits on black needs such images. Of an animation, the first frame is used.

    The confidence is the softmax of the logits, with a tanh head of the pre-tanh logits, because after tanh the softmax
    of ten classes never exceeds 45 %. It applies to clean images and does not measure robustness.

    Exits with 1 if some images could not be read (their rows state why), with 2 if no prediction was possible.

    Args:
        images: files, folders (with all folders below), and quoted patterns such as 'shots/**/*.jpg'.
        restored: folder for the restored images, as PNG.
        top: number of classes to list for each image, most likely first.
        csv: write comma-separated values, a row for each image as it is classified.
    """
    if csv and output.json:
        raise InputError("--csv and --json exclude each other; choose one")
    if top < 1:
        raise InputError(f"--top must be at least 1, found {top}")
    if not images:
        raise InputError("name at least one image, folder or pattern after the run")
    if restored is not None and restored.exists() and not restored.is_dir():
        raise InputError(f"--restored {restored} is a file; give a folder")
    from robustfpd.device import resolve_device
    from robustfpd.report.paths import resolve_network

    target = resolve_network(run, trust_code)
    model = target.load()
    if restored is not None and model.config.defence == "none":
        raise InputError(f"{target.name} is a baseline without restoration; leave out --restored")
    if model.task.in_channels not in (1, 3):
        raise InputError(f"{target.name} takes images of {model.task.in_channels} channels; image files have 1 or 3")
    model.to(resolve_device(device))
    shown = Output(quiet=True) if csv else output
    rows: Iterator[Row] = _rows(model, target, images, restored, top, shown)
    if csv and not output.quiet:
        rows = _write_csv(rows, top)
    predictions = list(rows)
    failed = sum(bool(row["error"]) for row in predictions)
    output.print_result({"model": target.name, "images": predictions, "unreadable": failed})
    _print_table(shown, predictions, restored, named=bool(target.class_names()))
    if failed:
        raise SystemExit(1)


def _rows(
    model: FPD | Baseline, target: Target, images: Sequence[str], restored: Path | None, top: int, output: Output
) -> Iterator[Row]:  # fmt: skip
    """Yield a row for each image, in order; memory holds one batch of images."""
    from robustfpd.data.image_files import decode_pictures, find_images

    files, class_names = find_images(images), target.class_names()
    config = None if target.config is None else target.config.data
    stored = model.task.image_size if config is None or config.stored_size is None else config.stored_size
    taken = {file.path.resolve() for file in files}
    with output.console.status(f"{target.name}: {len(files)} images") as status:
        for start in range(0, len(files), BATCH):
            status.update(f"{target.name}: {start} of {len(files)} images")
            batch = files[start : start + BATCH]
            readable = [file.path for file in batch if not file.problem]
            pictures = iter(decode_pictures(readable, stored, model.task.in_channels))
            inputs = [file.problem or next(pictures) for file in batch]
            pixels = [i.pixels for i in inputs if not isinstance(i, str)]
            predictions = _predictions(model, class_names, pixels, top)
            for file, picture in zip(batch, inputs, strict=True):
                row: Row = {"image": _printable(file.path), "class": None, "index": None, "confidence": None}
                row |= {"top": [], "change_rms": None, "change_mean": None, "restored": None, "note": "", "error": ""}
                if isinstance(picture, str):
                    yield row | {"error": picture}
                    continue
                prediction, restoration = next(predictions)
                if restored is not None and restoration is not None:
                    path = _free_path(restored, file.path, taken)
                    _write(restoration, path)
                    prediction["restored"] = _printable(path)
                yield row | {"note": ", ".join(picture.notes)} | prediction


def _predictions(
    model: FPD | Baseline, class_names: Sequence[str], pixels: Sequence[Any], top: int
) -> Iterator[tuple[Row, Tensor | None]]:
    """Yield a row's prediction and the restored image C×H×W of each image."""
    import numpy as np
    import torch

    from robustfpd.data.transforms import as_seen
    from robustfpd.models.predict import predict as predict_batch

    if not pixels:
        return
    images = as_seen(torch.from_numpy(np.stack(pixels)), model.task.in_channels, model.task.image_size)
    output = predict_batch(model, images.to(model.mean.device))
    confidences, classes = output.probabilities.topk(min(top, model.task.num_classes), dim=1)
    for i in range(len(pixels)):
        if not bool(confidences[i].isfinite().all()):
            yield {"error": "the network's logits are NaN"}, None
            continue
        likely = [
            {"class": class_names[index] if class_names else str(index), "index": index, "confidence": confidence}
            for index, confidence in zip(classes[i].tolist(), confidences[i].tolist(), strict=True)
        ]
        row: Row = {**likely[0], "top": likely}
        if output.restored is None or output.change_rms is None or output.change_mean is None:
            yield row, None
            continue
        row |= {"change_rms": float(output.change_rms[i]), "change_mean": float(output.change_mean[i])}
        yield row, output.restored[i].cpu()


def _free_path(folder: Path, image: Path, taken: set[Path]) -> Path:
    """Return `photo-restored.png`, or `photo-restored-2.png` if that is taken, and add it to `taken`."""
    number, path = 1, folder / f"{image.stem}-restored.png"
    while path.resolve() in taken:
        number += 1
        path = folder / f"{image.stem}-restored-{number}.png"
    taken.add(path.resolve())
    return path


def _write(picture: Tensor, path: Path) -> None:
    """Write an image C×H×W in [0, 1] as PNG."""
    from PIL import Image

    values = (255 * picture).round().byte().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0)).save(path)


def _write_csv(rows: Iterator[Row], top: int) -> Iterator[Row]:
    """Write each row as it comes to standard output, and yield it."""
    columns = ["image", "class", "index", "confidence", "change_rms", "change_mean", "restored", "note", "error"]
    more = [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("class", "index", "confidence")]
    writer = csv_format.DictWriter(sys.stdout, [*columns[:4], *more, *columns[4:]], extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        others = {f"{key}_{rank}": v for rank, one in enumerate(row["top"][1:], 2) for key, v in one.items()}
        cells = {**row, **others}
        writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in cells.items()})
        sys.stdout.flush()
        yield row


def _print_table(output: Output, rows: Sequence[Row], restored: Path | None, *, named: bool) -> None:
    """Print the rows as a table; `named`: the classes have names."""
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
    output.print(table)
    if changed:
        output.print("changed by: RMS distance of the restored image, in grey levels of 0 to 255")
    if not named:
        output.print("classes are numbers: their names are unknown")
    written = sum(row["restored"] is not None for row in rows)
    if written:
        output.print(f"wrote {written} restored images into {restored}")
    failed = sum(bool(row["error"]) for row in rows)
    if failed:
        output.print(f"{failed} of {len(rows)} could not be read")


def _printable(path: Path) -> str:
    """Return a path as text that can be printed, with bytes that are no UTF-8 replaced."""
    return os.fsencode(path).decode(errors="replace")
