"""Resolve a path or a name to a network, a run, evaluations, or a user's network. Needs no torch."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from robustfpd.config import load_run
from robustfpd.errors import InputError, MissingDataError
from robustfpd.io import readable_folder
from robustfpd.models import zoo
from robustfpd.models.checkpoint import CONFIG, read_settings
from robustfpd.models.import_model import check_trusted, find

if TYPE_CHECKING:
    from torch import nn

    from robustfpd.config import RunConfig, TaskConfig
    from robustfpd.models import FPD, Baseline

RUNS = Path("runs")
Kind = Literal["run", "saved model", "zoo", "factory", "evaluations", "record"]


@dataclass(frozen=True)
class Target:
    """What a path or a name stands for."""

    name: str
    """As the user gave it; of a zoo network its name."""
    kind: Kind
    path: Path
    """The folder of a run, model or evaluations, or the file of a record."""
    results: Path
    """The folder of its evaluation records."""
    task: TaskConfig | None = None
    """What the network was made for; None for a factory, and until `resolve_network` reads it."""
    config: RunConfig | None = None
    """Settings of the training; None for a saved model and a factory, and until `resolve_network` reads it."""
    trust_code: bool = False
    """Import and call the factory that the network's settings name."""

    @property
    def baseline(self) -> str | None:
        """Name of the zoo network that is the baseline of this zoo network."""
        name = self.name.replace("fpd", "baseline")
        return name if self.kind == "zoo" and name != self.name and name in zoo.names() else None

    def load(self) -> FPD | Baseline:
        """Load the network; an InputError for a factory's."""
        from robustfpd.models import load

        if self.kind == "factory":
            raise InputError(f"{self.name} is a factory; give a run, a saved model or a name from `robustfpd models`")
        return load(self.path, trust_code=self.trust_code)

    def classifier(self) -> nn.Module:
        """Load the network as a module from images to logits."""
        from robustfpd.models.import_model import import_model

        return import_model(self.name) if self.kind == "factory" else self.load().classifier()

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the network's classes; empty where they are unknown."""
        from robustfpd.data.datasets import class_names

        if self.config is None or self.task is None:
            return ()
        try:
            recorded = json.loads((self.path / "environment.json").read_text())["data"]["class_names"]
            names = tuple(map(str, recorded))
        except (OSError, ValueError, LookupError, TypeError):
            names = ()
        names = names or class_names(self.config.data, self.task.num_classes)
        return names if len(names) == self.task.num_classes else ()


def resolve(given: str | Path) -> Target:
    """Return what `given` stands for: a record, run, saved model, zoo network, folder of evaluations or factory.

    A zoo network is not downloaded; its path is where it lies, or where it will.

    Raises:
        InputError: there is no such thing; the message lists the nearest names.
    """
    name, path = str(given), Path(given)
    if path.is_file() and path.suffix == ".json":
        return Target(name, "record", path, path.parent)
    zoo_name = name if name in zoo.names() and not _is_model(path) else zoo.named(path)
    if zoo_name is not None:
        folder = zoo.place(zoo_name)[1] or zoo.cached() / zoo_name
        # Results go to the user's own folder: the network's is the repository's, or can be downloaded again.
        return Target(zoo_name, "zoo", folder, RUNS / f"{zoo_name.replace('/', '-')}-evaluation")
    if (path / zoo.SETTINGS).is_file():
        return Target(name, "run", path, path / "evaluation")
    # A saved model's folder is not written to: `model.save` replaces only folders that hold nothing else.
    beside = path.with_name(f"{path.resolve().name}-evaluation")
    if _is_model(path):
        return Target(name, "saved model", path, beside)
    if (path / "evaluation").is_dir():
        return Target(name, "evaluations", path, path / "evaluation")
    if path.is_dir() and (any(path.glob("*.json")) or any(path.glob("*.ledger.csv"))):
        return Target(name, "evaluations", path, path)
    if ":" in name:
        find(name, "--model")
        return Target(name, "factory", path, RUNS / f"{name.replace(':', '-').replace('.', '-')}-evaluation")
    raise _missing(name)


def resolve_network(given: str | Path, trust_code: bool = False) -> Target:
    """Return the network that `given` stands for, with its task and settings; a zoo network is downloaded.

    Args:
        given: a run's folder, a saved model, a zoo name, or `package.module:factory`.
        trust_code: whether the code that a saved network names may be run.

    Raises:
        InputError: `given` is no network, or is made by code that is not trusted.
    """
    target = resolve(given)
    if target.kind == "factory":
        return target
    if target.kind == "zoo":
        target = replace(target, path=zoo.find(target.name))
    elif target.kind == "run" and not _is_model(target.path):
        raise MissingDataError(f"no model in {given}: no epoch of this run is complete; continue with train --resume")
    elif target.kind in ("evaluations", "record"):
        raise _missing(str(given))
    best = readable_folder(target.path / "checkpoints" / "best")
    task, model = read_settings(best if best.is_dir() else target.path)
    if not trust_code:
        check_trusted(model.backbone, target.path)
    settings = target.path / zoo.SETTINGS
    return replace(target, task=task, config=load_run(settings) if settings.is_file() else None, trust_code=trust_code)


def _is_model(folder: Path) -> bool:
    """Whether a folder holds a loadable network: a run's best checkpoint, or a saved model."""
    return readable_folder(folder / "checkpoints" / "best").is_dir() or (readable_folder(folder) / CONFIG).is_file()


def _missing(name: str) -> InputError:
    """Return the error for a name that stands for nothing, with the nearest runs and zoo names."""
    folder = Path(name)
    near = difflib.get_close_matches(name, [*(str(p.parent) for p in RUNS.glob("*/config.yaml")), *zoo.names()], n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`robustfpd models` lists the zoo's names"
    if folder.is_dir():
        return MissingDataError(f"no run, model or evaluation in {folder}: {CONFIG} is not there; {hint}")
    return MissingDataError(f"no run, model or evaluation {name!r}: there is no such folder; {hint}")
