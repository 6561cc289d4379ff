"""The folder of a run: settings, metrics and checkpoints, later evaluations and a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from robustfpd.config import RunConfig, load_run
from robustfpd.data import Splits
from robustfpd.distributed import ProcessGroup
from robustfpd.errors import InputError, MissingDataError
from robustfpd.io import readable_folder, replace_folder, write_csv, write_json
from robustfpd.models import FPD, Baseline
from robustfpd.models.checkpoint import write_model_files
from robustfpd.provenance import environment

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
        self, config: RunConfig, resume: bool, device: torch.device, splits: Splits, start: str | Path | None = None,
        precision: str = "fp32",
    ) -> None:  # fmt: skip
        """Create the folder of a new run, or check that `config` is the run to resume.

        Args:
            config: settings of the run.
            resume: whether the folder must hold the run already.
            device: for the record `environment.json`.
            splits: as `device`.
            start: as `device`: where the initial weights come from.
            precision: `fp32` or `bf16`; a resumed run must have the same.

        Raises:
            InputError: a folder that holds a run, or none to resume, or one of other settings.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; choose another folder with --out")
        if resume and not self.started:
            raise InputError(f"nothing to resume in {self.path}; leave out --resume to start there")
        if self.started and not resume:
            raise InputError(f"{self.path} holds a run; continue it with --resume, or choose another folder with --out")
        if resume:
            self._check_settings(config, precision)
            return
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

    def write_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write one row per epoch, replacing the file, so that a resumed run lists each epoch once."""
        write_csv(self.metrics_file, history)


def _summary(splits: Splits) -> dict[str, Any]:
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
