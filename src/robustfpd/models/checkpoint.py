"""A model on disk: `model.safetensors` and `config.json` in one folder. Never pickle.

Torch is imported where weights are read or written, so that a model can be found without it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from robustfpd.config import EARLIER_DEFAULTS, ModelConfig, TaskConfig, parse, protocol_defaults
from robustfpd.errors import InputError, MissingDataError
from robustfpd.io import readable_folder, replace_folder

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
EARLIER = 1
"""Format of versions whose only networks were those of the protocols `corrected` and `published`."""
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def write_model(folder: Path, state: Mapping[str, Tensor], task: TaskConfig, config: ModelConfig) -> None:
    """Write weights and settings to `folder`, atomically; a model that is there is replaced.

    Raises:
        InputError: `folder` is a file, the working folder, or holds other files.
    """
    if folder.is_file():
        raise InputError(f"{folder} is a file; give an empty or new folder to save a model into")
    if folder.resolve() == Path.cwd():
        raise InputError(f"{folder} is the working folder, which cannot be replaced; give a folder inside it")
    if folder.exists() and any(p.name not in (WEIGHTS, CONFIG) for p in folder.iterdir()):
        raise InputError(f"{folder} holds other files; give an empty or new folder to save a model into")
    with replace_folder(folder) as new:
        write_model_files(new, state, task, config)


def write_model_files(folder: Path, state: Mapping[str, Tensor], task: TaskConfig, config: ModelConfig) -> None:
    """Write the two files of a model into an existing folder."""
    import torch
    from safetensors.torch import save_file

    # Cloned, because safetensors refuses tensors that share memory, such as tied weights.
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in state.items()}
    save_file(copies, folder / WEIGHTS)
    settings = {"format": FORMAT, "task": task.model_dump(mode="json"), "model": config.model_dump(mode="json")}
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")


def read_settings(folder: Path) -> tuple[TaskConfig, ModelConfig]:
    """Read what to build.

    Raises:
        MissingDataError: there is no `config.json`.
        InputError: it is damaged, of another format or another program's.
    """
    path = readable_folder(folder) / CONFIG
    if not path.is_file():
        raise MissingDataError(f"no model in {folder}: {CONFIG} is not there (looked in {folder.resolve()})")
    try:
        settings = json.loads(path.read_text())
        version = settings["format"]
        if version not in (EARLIER, FORMAT):
            raise InputError(
                f"{path} has format {version!r}, this robustfpd reads {EARLIER} and {FORMAT}; install the version that "
                "wrote it"
            )
        task, model = dict(settings["task"]), dict(settings["model"])
        if version == EARLIER:
            model = {**protocol_defaults("corrected", "model"), **model}
        model = {**EARLIER_DEFAULTS["model"], **model}
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a model's settings: {type(error).__name__} {error}") from None
    return parse(TaskConfig, task, str(path)), parse(ModelConfig, model, str(path))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights.

    Raises:
        MissingDataError: there is no `model.safetensors`.
        InputError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = readable_folder(folder) / WEIGHTS
    if not path.is_file():
        raise MissingDataError(f"no model in {folder}: {WEIGHTS} is not there")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
