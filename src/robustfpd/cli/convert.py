"""`robustfpd convert`."""

from __future__ import annotations

import shlex
from pathlib import Path

import tyro

from robustfpd.cli.common import Output
from robustfpd.errors import InputError


def convert(
    published: tyro.conf.Positional[Path],
    folder: tyro.conf.Positional[Path],
    /,
    image_size: int | None = None,
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    output: Output = Output(),  # noqa: B008
) -> None:
    """Convert one of the authors' checkpoints to a saved model, without executing code from the file.

    For example `robustfpd convert bestmodel_params.pkl svhn-published`, or
    `robustfpd convert caltech.pkl out --mean 0.485 0.456 0.406 --std 0.229 0.224 0.225`.

    Args:
        published: bestmodel_params.pkl or one of its siblings, ResNet or ResNeXt of any depth.
        folder: a new or empty folder for the model.
        image_size: height and width of the images in pixels; default 64 for 10 classes, else 224, as published.
        mean: per-channel mean that the authors subtracted in the data loader; the model then subtracts it. The second
            example has the values of CALTECH.
        std: per-channel standard deviation that they divided by.
    """
    if not published.is_file():
        raise InputError(f"there is no file {published}; give the authors' bestmodel_params.pkl")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} holds files; give a new or empty folder for the model")
    from robustfpd.cli.common import program
    from robustfpd.models.author_checkpoints import read_author_checkpoint

    checkpoint = read_author_checkpoint(published, image_size, mean or None, std or None)
    model, config = checkpoint.model, checkpoint.model.config
    model.save(folder)
    decoder = f"with a Feature Pyramid Decoder, {config.pyramid_channels} channels wide"
    epoch = "unknown" if checkpoint.epoch is None else checkpoint.epoch
    parameters = sum(p.numel() for p in model.parameters())
    output.print(
        f"{published}: {checkpoint.architecture} ({', '.join(map(str, checkpoint.blocks))} blocks), "
        f"{decoder if config.defence == 'fpd' else 'without a decoder'}",
        f"  {model.task}, {parameters / 1e6:.1f} million parameters, epoch {epoch}",
        f"wrote {folder}",
        f"next: {program()} evaluate {shlex.quote(str(folder))} --dataset DATASET, with the images it was trained for",
    )
    output.print_result({
        "published": str(published), "folder": str(folder), "architecture": checkpoint.architecture,
        "blocks": list(checkpoint.blocks), "defence": config.defence, "epoch": checkpoint.epoch,
        "parameters": parameters, "task": model.task.model_dump(mode="json"),
    })  # fmt: skip
