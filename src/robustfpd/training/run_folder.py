"""One run, one folder: settings, metrics, checkpoints; evaluation and report join later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    """Paths of a run and what is written there. Files are replaced, never half written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.csv"
        self.last = self.path / "checkpoints" / "last"
        self.best = self.path / "checkpoints" / "best"
        self.evaluation = self.path / "evaluation"

    @property
    def started(self) -> bool:
        """Whether a run has been here."""
        return self.config_file.is_file()

    def config(self) -> RunConfig:
        """The run's settings."""
        if not self.started:
            raise MissingDataError(f"no run in {self.path}: looked for {self.config_file.absolute()}")
        return load_run(self.config_file)

    def begin(
        self, config: RunConfig, resume: bool, device: torch.device, splits: Splits, start: str | Path | None = None,
        precision: str = "fp32",
    ) -> None:  # fmt: skip
        """Claim the folder for a run, or check that `config` is the run to be resumed."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; choose another folder with --out")
        if resume and not self.started:
            raise InputError(f"nothing to resume in {self.path}; leave out --resume to start there")
        if self.started and not resume:
            raise InputError(f"{self.path} holds a run; continue it with --resume, or choose another folder with --out")
        if resume:
            differing = _differences(self.config().model_dump(), config.model_dump())
            if differing:
                raise InputError(
                    f"--resume in {self.path} needs the same settings; these differ: {'; '.join(differing)}"
                )
            self._check_precision(precision)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        config.save(self.config_file)
        begun = None if start is None else str(start)
        how = {"precision": precision, "processes": ProcessGroup.current().world_size}
        origin = {"data": _summary(splits), "start": begun, **how}
        write_json(self.path / "environment.json", {**environment(device), **origin})

    def _check_precision(self, precision: str) -> None:
        """Refuse to go on in another arithmetic than that of the record; runs from before it was told had fp32."""
        path = self.path / "environment.json"
        begun = json.loads(path.read_text()).get("precision", "fp32") if path.is_file() else precision
        if begun != precision:
            raise InputError(
                f"the run in {self.path} was begun in {begun}, this would go on in {precision}; "
                f"add --precision {begun} (in Python precision={begun!r})"
            )

    def save_checkpoint(
        self, folder: Path, model: FPD | Baseline, weights: Mapping[str, Tensor], state: Mapping[str, Any] | None = None
    ) -> None:
        """Write a loadable model, with the training state beside it when given."""
        with replace_folder(folder) as new:
            write_model_files(new, weights, model.task, model.config)
            if state is not None:
                torch.save(dict(state), new / STATE)

    def training_state(self) -> dict[str, Any] | None:
        """The state beside the last checkpoint; None before the first epoch's end."""
        path = readable_folder(self.last) / STATE
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # an unpickler raises anything on bytes that are not a pickle
            # Not torch's own message, which recommends to unpickle without safeguards.
            raise InputError(
                f"{path} is damaged ({type(error).__name__}), so this run cannot be resumed; start in another folder"
            ) from None
        if not isinstance(state, dict) or not state.keys() >= STATE_KEYS:
            raise InputError(f"{path} is damaged: it does not hold {', '.join(sorted(STATE_KEYS))}")
        return state

    def write_metrics(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Write one row per epoch; rewritten whole, so that a resumed run has each epoch once."""
        write_csv(self.metrics_file, history)


def _summary(splits: Splits) -> dict[str, Any]:
    """What a run was trained on, for the record: counts, hashes, names of classes, and which files were left out."""
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    hashes = {name: {"images": len(part), "sha256": part.digest()} for name, part in parts.items()}
    return {**hashes, "class_names": list(splits.info.class_names), "skipped": list(splits.skipped)}


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in old.items():
        name = f"{prefix}{key}"
        if name in ("data.root", "data.download", "data.cache", "evaluation", f"{prefix}strategy"):
            continue  # where the images lie, who holds the weights, what is evaluated later: the training is the same
        if name == "adversarial" and old.get("stage") == new.get("stage") == "two-phase":
            continue  # the next stage's
        if isinstance(value, dict):
            found += _differences(value, new[key], f"{name}.")
        elif value != new[key]:
            found.append(f"{name} was {value!r}, now {new[key]!r}")
    return found
