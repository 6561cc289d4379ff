"""Code that several commands share: output, the data set to evaluate on, checks of arguments."""

from __future__ import annotations

import json as json_format
import os
import shutil
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from robustfpd.errors import InputError, unknown_name

if TYPE_CHECKING:
    from torch import nn

    from robustfpd.config import DataConfig, RunConfig
    from robustfpd.data import DatasetInfo, ImageSet
    from robustfpd.report.paths import Target

NO_DEFAULT = tyro.conf.arg(help_behavior_hint="")
"""Leaves "(default: None)" out of help."""
RUN = tyro.conf.arg(
    help="a run's folder, a network that comes with robustfpd (see `robustfpd models`), or a folder that model.save "
    "wrote."
)
ModelFlag = Annotated[str | None, tyro.conf.arg(
    help="package.module:factory of a torch.nn.Module, images in [0, 1] to logits, in place of a run; needs --dataset."
)]  # fmt: skip
TrustFlag = Annotated[bool, tyro.conf.arg(
    help="import and execute the module that defines the run's network (model.backbone=package.module:factory); use it "
    "only for runs that you trust."
)]  # fmt: skip
DeviceFlag = Annotated[str, tyro.conf.arg(help="auto, cpu, cuda or mps.")]


@dataclass(frozen=True)
class Output:
    """Text and tables, one JSON object, or nothing; errors and warnings go to standard error."""

    json: Annotated[bool, NO_DEFAULT] = False
    """Print the result as one JSON object, and nothing else."""
    quiet: Annotated[bool, NO_DEFAULT] = False
    """Print nothing but errors and warnings."""

    @cached_property
    def console(self) -> Console:
        """The console for text and displays; silent under --json and --quiet."""
        return Console(soft_wrap=True, quiet=self.json or self.quiet)

    def print(self, *parts: RenderableType) -> None:
        """Print text as it is (no markup, no line breaks, which would cut commands to copy), and tables."""
        for part in parts:
            if isinstance(part, Table) and not self.console.is_terminal:
                self._print_plain(part)
            else:
                wrapped = isinstance(part, Text) and self.console.is_terminal
                self.console.print(part, highlight=False, markup=False, soft_wrap=not wrapped)

    def print_wrapped(self, text: str) -> None:
        """Print sentences, wrapped to the terminal's width; piped, they stay on one line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def print_result(self, values: Mapping[str, Any]) -> None:
        """Print the JSON object under --json."""
        if self.json:
            print(json_format.dumps(dict(values), indent=2, default=str), flush=True)

    def _print_plain(self, table: Table) -> None:
        """Print a table without lines, boxes and trailing spaces, for files and pipes."""
        table.box = None
        with self.console.capture() as captured:
            self.console.print(table, highlight=False, soft_wrap=False)
        lines = captured.get().rstrip().splitlines()
        self.console.out("\n".join(line.rstrip() for line in lines), highlight=False)


@dataclass(frozen=True)
class DataFlags:
    """Which images to use; default those of the run."""

    dataset: Annotated[str | None, NO_DEFAULT] = None
    """Images of this data set instead of the run's; needed without a run (see `robustfpd datasets`)."""
    image_size: Annotated[int | None, NO_DEFAULT] = None
    """Height and width in pixels that --model expects; default the data set's own."""
    data_root: Annotated[str | None, NO_DEFAULT] = None
    """Folder of images for --dataset folder, else where torchvision keeps its data sets; default the run's."""
    download: Annotated[bool, NO_DEFAULT] = False
    """Download the data set into --data-root if it is not there."""

    def config(self, target: Target) -> DataConfig:
        """Return the run's data settings with these changes, and at the size and the channels the network takes.

        Raises:
            InputError: an unknown data set, none at all, or a size for a network that has one.
        """
        from robustfpd import config

        if self.dataset is not None:
            check_choice("dataset", self.dataset, config.DATASETS)
        elif target.config is None:
            raise InputError(f"{target.name} is no run; name its test images with --dataset")
        data = config.DataConfig() if target.config is None else target.config.data
        changes: dict[str, Any] = {"download": self.download or data.download, "root": self.data_root or data.root}
        if self.dataset is not None and (target.config is None or self.dataset != data.dataset):
            changes |= {"dataset": self.dataset, **_as_task(target, self.dataset)}
        if self.image_size is not None:
            if self.image_size < 1:
                raise InputError(f"--image-size must be at least 1, found {self.image_size}")
            if target.task is not None:
                raise InputError(f"--image-size is for --model; {target.name} was made for {target.task}")
            changes["image_size"] = (self.image_size, self.image_size)
        changed = data.model_copy(update=changes)
        check_folder(changed)
        return changed


def _as_task(target: Target, dataset: str) -> dict[str, Any]:
    """Return the settings that bring the images of a data set to the task of a network, where that is known."""
    from robustfpd import data

    if target.task is None:
        return {}
    info = data.info(dataset)
    channels = max(info.in_channels, target.task.in_channels)
    return {
        "image_size": target.task.image_size, "channels": channels if channels in (1, 3) else None,
        # The authors' CALTECH networks count the background as a class.
        "background": target.task.num_classes == info.num_classes + 1,
    }  # fmt: skip


def named_network(run: Path | None, model: str | None, trust_code: bool) -> Target:
    """Return the network that is named as a path or zoo name, or as --model package.module:factory."""
    from robustfpd.models.import_model import find
    from robustfpd.report.paths import resolve_network

    if run is not None and model is not None:
        raise InputError(f"name one network: {run}, or --model {model}")
    if model is not None:
        find(model, "--model")
        return resolve_network(model)
    if run is None:
        raise InputError("name a network: a run, a trained network or a saved model, or --model package.module:factory")
    return resolve_network(run, trust_code)


def load_images(
    config: DataConfig, split: str, target: Target, classifier: nn.Module
) -> tuple[ImageSet, tuple[str, ...]]:
    """Return the images to attack, which must fit the network's task, and the names of their classes."""
    from robustfpd import data

    if split == "validation" and config.selection == "test":
        raise InputError(f"{target.name} has no validation images (data.selection is test); evaluate the test images")
    splits = data.load(config)
    if target.task is not None and splits.info.task != target.task:
        raise InputError(f"{target.name} was trained for {target.task}, {splits.info.name} has {splits.info.task}")
    images = splits.test if split == "test" else splits.validation
    if target.task is None:
        _check_classes(target.name, classifier, images, splits.info)
    return images, splits.info.class_names


def _check_classes(name: str, classifier: nn.Module, images: ImageSet, info: DatasetInfo) -> None:
    """Raise an InputError unless a module of the user's gives one logit for each class of the data set."""
    import torch

    from robustfpd.device import evaluating
    from robustfpd.errors import first_line
    from robustfpd.evaluation.inputs import device_of

    image = images.take(torch.tensor([0])).floats()[0].to(device_of(classifier, torch.zeros(1)))
    try:
        with evaluating(classifier), torch.no_grad():
            logits = classifier(image)
    except Exception as error:
        raise InputError(
            f"{name} raised {type(error).__name__} on an image {tuple(image.shape)} of {info.name}: "
            f"{first_line(error)}; --image-size sets the size"
        ) from error
    if isinstance(logits, torch.Tensor) and logits.ndim == 2 and logits.shape[1] != info.num_classes:
        raise InputError(f"{name} gives {logits.shape[1]} logits, {info.name} has {info.num_classes} classes")


def program() -> str:
    """Return how the user's shell calls this program; `make` runs it from a virtual environment not on PATH."""
    called = sys.argv[0] if sys.argv else ""
    return "robustfpd" if shutil.which("robustfpd") or not called.endswith("robustfpd") else os.path.relpath(called)


def check_choice(kind: str, name: str, names: Collection[str]) -> None:
    """Raise an InputError with the nearest names unless `name` is one of `names`."""
    if name not in names:
        raise unknown_name(kind, name, names)


def check_settings(run: RunConfig) -> None:
    """Raise an InputError for names and folders in a run's settings that do not exist; needs no torch."""
    from robustfpd.config import DATASETS, SUITES
    from robustfpd.models.import_model import find, is_import_path

    check_choice("dataset", run.data.dataset, DATASETS)
    check_choice("suite", run.evaluation.suite, SUITES)
    if is_import_path(run.model.backbone):
        find(run.model.backbone, "model.backbone")
    check_folder(run.data)


def check_folder(data: DataConfig) -> None:
    """Raise an InputError if the folder of the user's own images does not exist."""
    root = Path(data.root).expanduser()
    if data.dataset == "folder" and not root.is_dir():
        raise InputError(
            f"no folder {root.absolute()}; give the one that holds a folder of images per class as --data-root"
        )
