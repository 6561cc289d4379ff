"""What several commands do alike: apply shared flags, check names before torch is imported, name the program."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from robustfpd.errors import InputError, unknown_name

if TYPE_CHECKING:
    import torch

    from robustfpd.config import DataConfig, RunConfig


def program() -> str:
    """How the user's shell calls this program; `make` runs it from a virtual environment that may not be on PATH."""
    called = sys.argv[0] if sys.argv else ""
    return "robustfpd" if shutil.which("robustfpd") or not called.endswith("robustfpd") else os.path.relpath(called)


def settings_together(arguments: Sequence[str]) -> list[str]:
    """Move the `group.field=value` words of `train` to the end; values of flags stay, whatever they look like.

    argparse takes a list of words only where they stand together.
    """
    from robustfpd.cli import function
    from robustfpd.cli.parsing import walk

    setting = re.compile(r"[a-z]\w*(\.\w+)+=.*", re.DOTALL)
    walked = walk(function("train"), arguments)
    moved = sorted(walked, key=lambda w: w.place >= 0 and setting.fullmatch(w.text) is not None)  # a stable sort
    return [word.text for word in moved]


def configured(run: RunConfig, data_root: str | None, download: bool, seed: int | None) -> RunConfig:
    """Apply the flags that commands share to a run's settings."""
    changes = {"root": data_root} if data_root is not None else {}
    data = run.data.model_copy(update={**changes, "download": download or run.data.download})
    return run.model_copy(update={"data": data, "seed": run.seed if seed is None else seed})


def known(kind: str, name: str, names: Collection[str]) -> str:
    """Return `name` if it is one of `names`; an InputError with the nearest ones otherwise."""
    if name not in names:
        raise unknown_name(kind, name, names)
    return name


def check_settings(run: RunConfig) -> None:
    """Refuse what a run cannot mean, as far as names and folders tell; needs no torch."""
    from robustfpd.config import DATASETS, SUITES
    from robustfpd.models.import_model import find, is_import_path

    known("dataset", run.data.dataset, DATASETS)
    known("suite", run.evaluation.suite, SUITES)
    if is_import_path(run.model.backbone):
        find(run.model.backbone, "model.backbone")
    check_folder(run.data)


def check_folder(data: DataConfig) -> None:
    """Refuse a folder of the user's own images that is not there."""
    root = Path(data.root).expanduser()
    if data.dataset == "folder" and not root.is_dir():
        raise InputError(
            f"no folder {root.absolute()}; give the one that holds a folder of images per class as --data-root"
        )


TIMED_SECONDS = 0.5
"""How long `timed` repeats."""


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call of `action`, after one to warm up: the least of several, as other load only adds.

    Args:
        action: what is timed; called at least twice.
        device: the device that it computes on.
    """
    import torch

    def once() -> float:
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    seconds, begun = once(), time.perf_counter()
    while time.perf_counter() - begun < TIMED_SECONDS:
        seconds = min(seconds, once())
    return seconds
