"""`robustfpd export`."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from robustfpd.errors import InputError

if TYPE_CHECKING:
    from robustfpd.models.export import Exported


def export(
    run: tyro.conf.Positional[Path],
    /,
    format: Literal["onnx", "torch"] = "onnx",
    out: Path | None = None,
    restored: bool = False,
    image_size: tuple[int, ...] = (),
    trust_code: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Write a network to one file that runs without robustfpd, once it gives what the network gives.

    For example `robustfpd export digits/mini-fpd --restored`,
    or `robustfpd export runs/folder-mini --format torch --out service/classifier.pt2`.

    The file takes `images`, any number of them, float32 in [0, 1], and gives `logits` as evaluations see them. It is
    read again and compared with the network, to 1e-4, before it takes its place. It also says its classes, the version
    of robustfpd and the SHA-256 of the weights.

    ONNX needs `pip install 'robustfpd[export]'`. A torch program is for torch.export.load(FILE).module(); ours hold raw
    weights and JSON, but that function would run what somebody else put into such a file: load only what you trust.

    Args:
        run: a run's folder, a network that comes with robustfpd (see `robustfpd models`), or a folder that model.save
            wrote.
        format: onnx, or torch for a program of torch.export.
        out: the file; default the network's name in the folder you are in.
        restored: give the restored images as a second output.
        image_size: height and width of the images, or one number; default what the network was made for.
        trust_code: import and run the module that the run's network is made by (model.backbone=package.module:factory);
            only for runs of your own.
        json: write one JSON object.
        quiet: say nothing.
    """
    if len(image_size) > 2 or any(side < 1 for side in image_size):
        raise InputError(f"--image-size must be one or two positive numbers, found {' '.join(map(str, image_size))}")
    if out is not None and out.is_dir():
        raise InputError(f"--out {out} is a folder; give a file")
    from robustfpd.cli.networks import network
    from robustfpd.cli.output import Output

    output = Output(json=json, quiet=quiet)
    found = network(run, trust_code)
    from robustfpd.models.export import SUFFIXES
    from robustfpd.models.export import export as exported

    path = out or Path(found.name.strip("/.").replace("/", "-") + SUFFIXES[format])
    size = None if not image_size else (image_size[0], image_size[-1])
    with output.console.status(f"{found.name}: exporting to {path}, and comparing"):
        made = exported(
            found.model, path, format=format, restored=restored, image_size=size, class_names=found.class_names
        )
    output.result({
        "model": found.name, "file": str(made.path), "format": format, "outputs": made.outputs,
        "image_size": made.image_size, "difference": made.difference, "images_compared": made.compared,
        "bytes": made.path.stat().st_size,
        "metadata": {**made.facts, "class_names": json_format.loads(made.facts["class_names"])},
    })  # fmt: skip
    output.say(*_told(made))


def _told(made: Exported) -> list[str]:
    """What was written, and how well it was checked."""
    outputs = "\n".join(f"  {name}: {made.facts[name]}" for name in made.outputs)
    return [
        f"wrote {made.path}, {made.path.stat().st_size / 1e6:.1f} MB",
        f"  images: {made.facts['images']}\n{outputs}",
        f"compared with the network on {made.compared} images: the largest difference is {made.difference:.1e}",
    ]
