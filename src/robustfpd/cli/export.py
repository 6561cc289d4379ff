"""`robustfpd export`."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Literal

import tyro

from robustfpd.cli.common import RUN, Output, TrustFlag
from robustfpd.errors import InputError


def export(
    run: Annotated[tyro.conf.Positional[Path], RUN],
    /,
    format: Literal["onnx", "torch"] = "onnx",
    out: Path | None = None,
    restored: bool = False,
    image_size: tuple[int, ...] = (),
    trust_code: TrustFlag = False,
    output: Output = Output(),  # noqa: B008
) -> None:
    """Export a network to a single file that runs without robustfpd, and verify its outputs.

    For example `robustfpd export digits/mini-fpd --restored`,
    or `robustfpd export runs/folder-mini --format torch --out service/classifier.pt2`.

    Its input is `images`, N×C×H×W float32 in [0, 1]; its output `logits`, as in evaluations. It is compared with the
    network, to 1e-4, before it is written, and its metadata holds the classes, the version of robustfpd and the SHA-256
    of the weights.

    ONNX needs `pip install 'robustfpd[export]'`. Load a torch program with torch.export.load(FILE).module(). This can
    execute code from the file: load only files that you trust.

    Args:
        format: onnx, or torch for a program of torch.export.
        out: the file; default the network's name in the current folder.
        restored: add the restored images as a second output.
        image_size: height and width of the images, or one number; default the network's.
    """
    if len(image_size) > 2 or any(side < 1 for side in image_size):
        raise InputError(f"--image-size must be one or two positive numbers, found {' '.join(map(str, image_size))}")
    if out is not None and out.is_dir():
        raise InputError(f"--out {out} is a folder; give a file")
    from robustfpd.report.paths import resolve_network

    target = resolve_network(run, trust_code)
    from robustfpd.models.export import SUFFIXES
    from robustfpd.models.export import export as exported

    path = out or Path(target.name.strip("/.").replace("/", "-") + SUFFIXES[format])
    size = None if not image_size else (image_size[0], image_size[-1])
    with output.console.status(f"{target.name}: exporting to {path}"):
        made = exported(
            target.load(), path, format=format, restored=restored, image_size=size, class_names=target.class_names()
        )
    output.print_result({
        "model": target.name, "file": str(made.path), "format": format, "outputs": made.outputs,
        "image_size": made.image_size, "difference": made.difference, "images_compared": made.compared,
        "bytes": made.path.stat().st_size,
        "metadata": {**made.facts, "class_names": json_format.loads(made.facts["class_names"])},
    })  # fmt: skip
    output.print(
        f"wrote {made.path}, {made.path.stat().st_size / 1e6:.1f} MB",
        *(f"  {name}: {made.facts[name]}" for name in ("images", *made.outputs)),
        f"compared with the network on {made.compared} images: the largest difference is {made.difference:.1e}",
    )
