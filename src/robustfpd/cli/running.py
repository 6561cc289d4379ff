"""What several commands do alike: apply shared flags, pick a device, name the program."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from robustfpd.errors import InputError

if TYPE_CHECKING:
    import torch

    from robustfpd.config import RunConfig


def program() -> str:
    """How the user's shell calls this program; `make` runs it from a virtual environment that may not be on PATH."""
    called = sys.argv[0] if sys.argv else ""
    return "robustfpd" if shutil.which("robustfpd") or not called.endswith("robustfpd") else os.path.relpath(called)


def settings_together(arguments: Sequence[str]) -> list[str]:
    """Move `group.field=value` words to the end: argparse takes a list of words only where they stand together."""
    setting = re.compile(r"[a-z]\w*(\.\w+)+=.*", re.DOTALL)
    return sorted(arguments, key=lambda word: setting.fullmatch(word) is not None)  # a stable sort


def configured(run: RunConfig, data_root: str | None, download: bool, seed: int | None) -> RunConfig:
    """Apply the flags that commands share to a run's settings."""
    changes = {"root": data_root} if data_root is not None else {}
    data = run.data.model_copy(update={**changes, "download": download or run.data.download})
    return run.model_copy(update={"data": data, "seed": run.seed if seed is None else seed})


def torch_device(name: str) -> torch.device:
    """Return a device that works here; `auto` takes a GPU when there is one."""
    import torch

    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(chosen)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device
