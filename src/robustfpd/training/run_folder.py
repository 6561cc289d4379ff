"""A run: its folder of settings, metrics and checkpoints, and the setup of its training: images and a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from robustfpd import data
from robustfpd.config import RunConfig, load_run
from robustfpd.distributed import LaunchEnvironment, ProcessGroup, shared_errors
from robustfpd.errors import InputError, MissingDataError
from robustfpd.io import readable_folder, replace_folder, write_json
from robustfpd.models import FPD, Baseline, build, load
from robustfpd.models.checkpoint import read_settings, write_model_files
from robustfpd.models.factory import saved_in
from robustfpd.provenance import environment
from robustfpd.training.fabric import synchronise_batch_norm

STATE = "training.pt"
STATE_KEYS = frozenset({"optimizer", "schedule", "stopping", "history"})


class RunFolder:
    """Paths of a run, and its files, which are written atomically.

    Args:
        path: the run's folder; need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.csv"
        self.last = self.path / "checkpoints" / "last"
        self.best = self.path / "checkpoints" / "best"
        self.evaluation = self.path / "evaluation"

    @property
    def started(self) -> bool:
        """Whether the folder holds a run."""
        return self.config_file.is_file()

    def config(self) -> RunConfig:
        """Read the run's settings."""
        if not self.started:
            raise MissingDataError(f"no run in {self.path}: looked for {self.config_file.absolute()}")
        return load_run(self.config_file)

    def begin(
        self, config: RunConfig, resume: bool, device: torch.device, splits: data.Splits,
        start: str | Path | None = None, precision: str = "fp32",
    ) -> None:  # fmt: skip
        """Create the folder of a new run and record its environment, or check that it holds the run to resume.

        A resumed run must have the same settings and the same `precision`, `fp32` or `bf16`.

        Raises:
            InputError: a folder that holds a run, or none to resume, or one of other settings.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; choose another folder with --out")
        if resume:
            if not self.started:
                raise InputError(f"nothing to resume in {self.path}; leave out --resume to start there")
            self._check_settings(config, precision)
            return
        if self.started:
            raise InputError(f"{self.path} holds a run; continue it with --resume, or choose another folder with --out")
        self.path.mkdir(parents=True, exist_ok=True)
        config.save(self.config_file)
        record = {
            **environment(device), "data": _summary(splits), "start": None if start is None else str(start),
            "precision": precision, "processes": ProcessGroup.current().world_size,
        }  # fmt: skip
        write_json(self.path / "environment.json", record)

    def _check_settings(self, config: RunConfig, precision: str) -> None:
        different = _differences(self.config().model_dump(), config.model_dump())
        if different:
            raise InputError(f"--resume in {self.path} needs the same settings; these differ: {'; '.join(different)}")
        record = self.path / "environment.json"
        begun = json.loads(record.read_text()).get("precision", precision) if record.is_file() else precision
        if begun != precision:
            raise InputError(
                f"the run in {self.path} has precision {begun}, found {precision}; "
                f"add --precision {begun} (in Python precision={begun!r})"
            )

    def save_checkpoint(self, folder: Path, model: FPD | Baseline, state: Mapping[str, Any] | None = None) -> None:
        """Write a model that `load` reads, with the training state beside it where given."""
        with replace_folder(folder) as new:
            write_model_files(new, model.state_dict(), model.task, model.config)
            if state is not None:
                torch.save(dict(state), new / STATE)

    def training_state(self) -> dict[str, Any] | None:
        """Read the state of the last checkpoint; None before the end of the first epoch.

        Raises:
            InputError: a missing or damaged checkpoint.
        """
        path = readable_folder(self.last) / STATE
        if not path.is_file():
            if self.metrics_file.is_file():
                raise InputError(
                    f"{self.last} is missing, though {self.metrics_file} lists finished epochs; put it back, or start "
                    "in another folder"
                )
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # an unpickler raises any exception on bytes that are not a pickle
            # Without torch's own message, which recommends to unpickle without safeguards.
            raise InputError(
                f"{path} is damaged ({type(error).__name__}), so this run cannot be resumed; start in another folder"
            ) from None
        if not isinstance(state, dict) or not state.keys() >= STATE_KEYS:
            raise InputError(f"{path} is damaged: it does not hold {', '.join(sorted(STATE_KEYS))}")
        return state


def _summary(splits: data.Splits) -> dict[str, Any]:
    """Return counts and hashes of the images, class names and skipped files, for the record."""
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    hashes = {name: {"images": len(part), "sha256": part.digest()} for name, part in parts.items()}
    return {**hashes, "class_names": list(splits.info.class_names), "skipped": list(splits.skipped)}


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    different: list[str] = []
    for key, value in old.items():
        name = f"{prefix}{key}"
        if name in ("data.root", "data.download", "data.cache", "evaluation"):
            continue  # where the images are and what is evaluated later do not change the training
        if name == "adversarial" and old.get("stage") == new.get("stage") == "two-phase":
            continue  # the next stage's
        if isinstance(value, dict):
            different += _differences(value, new[key], f"{name}.")
        elif value != new[key]:
            different.append(f"{name} was {value!r}, now {new[key]!r}")
    return different


def check_ranks(group: ProcessGroup, config: RunConfig, out_dir: str | Path, start: object, resume: bool) -> None:
    """Check that torchrun or srun started all ranks, with the same arguments; raise an InputError otherwise."""
    started = LaunchEnvironment.read().world_size
    with shared_errors():
        if group.world_size != started:
            raise InputError(
                f"the process group has {group.world_size} ranks, of which torchrun or srun started {started}; "
                "start the script with torchrun or srun, or train in one process"
            )
    settings = {"settings": config.model_dump_json(), "out_dir": str(out_dir), "start": str(start), "resume": resume}
    group.check_equal(settings)


def load_splits(config: RunConfig, world_size: int) -> data.Splits:
    """Load the images of a run; raise an InputError if there are too few, or for batches of unequal parts per rank."""
    _check_batch_size(config, world_size)
    splits = data.load(config.data)
    images = len(splits.train)
    if len(splits.validation) == 0:
        raise InputError(
            f"{config.data.dataset} has {images} training images of {splits.info.num_classes} classes, too few to hold "
            "any out for validation: each class needs two"
        )
    if images < config.procedure.batch_size and images % world_size:
        raise InputError(
            f"{images} training images are fewer than one batch and not a multiple of {world_size} ranks; "
            "train in one process"
        )
    return splits


def _check_batch_size(config: RunConfig, world_size: int) -> None:
    """Check that each rank gets equally many images of a batch, with `batch: halves` of each half."""
    batch_size = config.procedure.batch_size
    stage = "adversarial" if config.stage == "adversarial" else "training"
    halves = stage == "adversarial" and config.adversarial.batch == "halves"
    parts = world_size * (2 if halves else 1)
    if batch_size % parts:
        near = max(parts, batch_size // parts * parts)
        raise InputError(
            f"{stage}.batch_size counts the images of all {world_size} ranks and must be a multiple of {parts}"
            f"{' with adversarial.batch=halves' if halves else ''}, found {batch_size}; give {stage}.batch_size={near}"
        )


def build_model(
    config: RunConfig, splits: data.Splits, net: nn.Module | None, start: str | Path | None, world_size: int
) -> FPD | Baseline:
    """Return the model that a training starts with; `net` and `start` as in `robustfpd.train`."""
    model = build(splits.info.task, config.model, net=net, seed=config.seed)
    if start is not None:
        _load_start(model, Path(start), net, config.data.dataset)
    if config.procedure.sync_batchnorm and world_size > 1:
        synchronise_batch_norm(model)
    return model


def _load_start(model: FPD | Baseline, start: Path, net: nn.Module | None, dataset: str) -> None:
    """Load the weights of checkpoint `start`, which must be of the model's architecture and task."""
    path = saved_in(start)
    task, config = read_settings(path)
    if task != model.task:
        raise InputError(
            f"{start} was trained for {task}, but data set {dataset} has {model.task}; "
            "start from a checkpoint of the same classes and image size, or give the data it was trained on"
        )
    ignored = {"pretrained", "dropout"}  # the trained weights do not depend on them
    old, new = (c.model_dump(exclude=ignored) for c in (config, model.config))
    different = [f"{name} was {value!r}, now {new[name]!r}" for name, value in old.items() if value != new[name]]
    if different:
        raise InputError(f"{start} holds another network than this run's model settings: {'; '.join(different)}")
    source = load(path, net=net, trust_code=True)  # the backbone is the one that this run's settings name
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as error:
        lines = str(error).splitlines()
        reason = lines[1].strip() if len(lines) > 1 else str(error)
        raise InputError(f"{start} holds another network than this run's model settings build: {reason}") from None
