"""What `robustfpd evaluate` attacks: a run, a trained network, a saved model, or any module of the user's."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from robustfpd.errors import InputError, first_line, unknown_name

if TYPE_CHECKING:
    from torch import nn

    from robustfpd.config import RunConfig, TaskConfig


@dataclass(frozen=True)
class Subject:
    """A classifier to attack, and where what is found goes."""

    name: str
    classifier: nn.Module
    task: TaskConfig | None
    """What it was made for; None for a module of the user's."""
    config: RunConfig | None
    """How it was trained; None for a saved model and for a module of the user's."""
    results: Path
    twin: str | None = None
    """The trained network that is its plain twin."""


def subject(run: Path | None, model: str | None) -> Subject:
    """Find what the user named, by a path or by `package.module:factory`."""
    if run is not None and model is not None:
        raise InputError(f"name one thing to attack: {run}, or --model {model}")
    if run is None and model is None:
        raise InputError(
            "name what to attack: a run, a trained network or a saved model, or --model package.module:factory"
        )
    if model is not None:
        folder = Path("runs") / f"{model.replace(':', '-').replace('.', '-')}-evaluation"
        return Subject(model, foreign(model), None, None, folder)
    assert run is not None
    return trained(run)


def trained(given: Path) -> Subject:
    """Tell a network that comes with robustfpd, a run and a saved model apart."""
    from robustfpd.config import load_run
    from robustfpd.models import load, shipped
    from robustfpd.training import RunFolder

    folder = shipped.locate(given)
    name = shipped.named(folder)
    network = load(folder)
    classifier, task = network.classifier(), network.task
    if name is not None:  # its folder is the repository's, or one that can be fetched again: results go to the user's
        results = Path("runs") / f"{name.replace('/', '-')}-evaluation"
        twin = name.replace("fpd", "plain")
        known = twin if twin != name and twin in shipped.names() else None
        return Subject(name, classifier, task, load_run(folder / shipped.SETTINGS), results, known)
    run = RunFolder(folder)
    if run.started:
        return Subject(str(given), classifier, task, run.config(), run.evaluation)
    # A saved model's folder stays as it is: model.save replaces only folders that hold nothing else.
    results = folder.with_name(f"{folder.resolve().name}-evaluation")
    return Subject(str(given), classifier, task, None, results)


def foreign(given: str) -> nn.Module:
    """Import `package.module:factory`, also from the folder one is in, and call it; a module is taken as it is."""
    from torch import nn

    place, _, name = given.partition(":")
    if not place or not name:
        raise InputError(f"--model must be package.module:factory, found {given!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(place)
    except Exception as error:  # a module of the user's may raise anything
        raise InputError(
            f"{place} cannot be imported from here: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not hasattr(module, name):
        raise unknown_name(f"name in {place}", name, [n for n in vars(module) if not n.startswith("_")])
    found = getattr(module, name)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise InputError(
                f"{given} must be a torch.nn.Module or a function that gives one, found {type(found).__name__}"
            )
        try:
            found = found()
        except Exception as error:
            raise InputError(f"{given}() raised {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(found, nn.Module):
        raise InputError(f"{given}() must give a torch.nn.Module, found {type(found).__name__}")
    return found


def surrogates(given: tuple[str, ...], twin: str | None) -> dict[str, nn.Module]:
    """Networks to make transferred attacks on, by name: those that were named, and the plain twin that is known."""
    names = dict.fromkeys((*given, *([twin] if twin is not None else [])))
    return {name: foreign(name) if ":" in name else trained(Path(name)).classifier for name in names}
