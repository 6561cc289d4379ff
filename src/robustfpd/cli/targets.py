"""What `robustfpd evaluate` attacks: a run, a trained network, a saved model, or any module of the user's.

What it is, its settings and what is wrong with its name are told without torch; only `classifier` imports it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from robustfpd.errors import InputError, MissingDataError

if TYPE_CHECKING:
    from torch import nn

    from robustfpd.config import RunConfig, TaskConfig


@dataclass(frozen=True)
class Subject:
    """A classifier to attack, and where what is found goes."""

    name: str
    source: Path | str
    """Its folder, or `package.module:factory`."""
    task: TaskConfig | None
    """What it was made for; None for a module of the user's."""
    config: RunConfig | None
    """How it was trained; None for a saved model and for a module of the user's."""
    results: Path
    baseline: str | None = None
    """The trained network that is its baseline."""
    trust_code: bool = False
    """Import and run what a saved network is made by."""

    def classifier(self) -> nn.Module:
        """Load it."""
        from robustfpd.models import load
        from robustfpd.models.import_model import import_model

        if isinstance(self.source, str):
            return import_model(self.source)
        return load(self.source, trust_code=self.trust_code).classifier()


def subject(run: Path | None, model: str | None, trust_code: bool = False) -> Subject:
    """Find what the user named, by a path or by `package.module:factory`."""
    from robustfpd.models.import_model import find

    if run is not None and model is not None:
        raise InputError(f"name one thing to attack: {run}, or --model {model}")
    if run is None and model is None:
        raise InputError(
            "name what to attack: a run, a trained network or a saved model, or --model package.module:factory"
        )
    if model is not None:
        find(model, "--model")
        folder = Path("runs") / f"{model.replace(':', '-').replace('.', '-')}-evaluation"
        return Subject(model, model, None, None, folder)
    assert run is not None
    return trained(run, trust_code)


def trained(given: Path, trust_code: bool = False) -> Subject:
    """Tell a network that comes with robustfpd, a run and a saved model apart; refuse code that is not trusted."""
    from robustfpd.config import load_run
    from robustfpd.models import zoo
    from robustfpd.models.checkpoint import read_settings
    from robustfpd.models.import_model import check_trusted

    folder = zoo.locate(given)
    name = zoo.named(folder)
    task, config = read_settings(_model_in(folder))
    if not trust_code:
        check_trusted(config.backbone, folder)
    if name is not None:  # its folder is the repository's, or one that can be fetched again: results go to the user's
        results = Path("runs") / f"{name.replace('/', '-')}-evaluation"
        baseline = name.replace("fpd", "baseline")
        known = baseline if baseline != name and baseline in zoo.names() else None
        return Subject(name, folder, task, load_run(folder / zoo.SETTINGS), results, known)
    settings = folder / zoo.SETTINGS
    if settings.is_file():
        return Subject(str(given), folder, task, load_run(settings), folder / "evaluation", trust_code=trust_code)
    # A saved model's folder stays as it is: model.save replaces only folders that hold nothing else.
    results = folder.with_name(f"{folder.resolve().name}-evaluation")
    return Subject(str(given), folder, task, None, results, trust_code=trust_code)


def _model_in(folder: Path) -> Path:
    """Where the model of a run or of a saved model lies; an InputError that says what else there is."""
    from robustfpd.io import readable_folder
    from robustfpd.models import zoo
    from robustfpd.models.checkpoint import CONFIG

    best = readable_folder(folder / "checkpoints" / "best")
    if best.is_dir():
        return best
    if (readable_folder(folder) / CONFIG).is_file():
        return folder
    if (folder / zoo.SETTINGS).is_file():
        raise MissingDataError(f"no model in {folder}: no epoch of this run was whole yet; go on with train --resume")
    runs = [str(path.parent) for path in Path("runs").glob("*/config.yaml")]
    near = difflib.get_close_matches(str(folder), [*runs, *zoo.names()], n=3, cutoff=0.6)
    why = f"{CONFIG} is not there (looked in {folder.resolve()})" if folder.is_dir() else "there is no such folder"
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "`robustfpd models` lists those that come along"
    raise MissingDataError(f"no model in {folder}: {why}; {hint}")


def surrogates(given: tuple[str, ...], baseline: str | None, trust_code: bool = False) -> dict[str, Subject]:
    """Networks to make transferred attacks on, by name: those that were named, and the baseline that is known."""
    names = dict.fromkeys((*given, *([baseline] if baseline is not None else [])))
    return {name: subject(None, name) if ":" in name else trained(Path(name), trust_code) for name in names}
