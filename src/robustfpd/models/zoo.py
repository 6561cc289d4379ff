"""The zoo: trained networks in the checkout's `models/` folder, or downloaded from a copy of it.

The packaged manifest lists each file with its hash, so that a downloaded network is verified to be the evaluated one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from pydantic import Field

from robustfpd.config import Config, parse
from robustfpd.errors import InputError, MissingDataError, unknown_name
from robustfpd.io import cache_folder, check_url, download, readable_folder
from robustfpd.models.checkpoint import CONFIG, WEIGHTS

VARIABLE = "ROBUSTFPD_MODELS_URL"
"""Environment variable with the address of a copy of the `models/` folder; there is none by default."""
SETTINGS = "config.yaml"
"""The run's settings, beside the model."""
VERIFIED = (SETTINGS, CONFIG, WEIGHTS)
"""Files that are checked at each use, unlike card and results. Weights are downloaded last: they complete a model."""
LARGEST = 5_000_000
"""Largest size of a file in bytes."""
MANIFEST = Path(__file__).with_name("manifest.json")


class ZooFile(Config):
    """One file of a model."""

    path: str = Field(pattern=r"^[a-z0-9_-]+/[a-z0-9_-]+(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)+$")
    """Below the `models/` folder; no part begins with a dot, so that none leads out of it."""
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    """Of its content."""
    size: int = Field(gt=0, le=LARGEST)
    """In bytes."""

    @property
    def name(self) -> str:
        """Its path below the model's own folder."""
        return "/".join(PurePosixPath(self.path).parts[2:])

    def is_in(self, folder: Path) -> bool:
        """Return whether a `models/` folder holds the file with the right content."""
        return (folder / self.path).is_file() and digest(folder / self.path) == self.sha256


class ZooModel(Config):
    """One trained network."""

    description: str
    """One line."""
    recipe: str
    """Recipe of its training."""
    dataset: str
    """Data set of its training."""
    defence: str
    """`fpd` or `none`."""
    training: str
    """Its last stage of training, in a few words."""
    images: str = ""
    """Images that it was trained and evaluated on, where they are not the data set's own parts."""
    results: tuple[str, ...] = ()
    """Paths of its evaluation records; the first is the main one."""
    files: tuple[ZooFile, ...]
    """Everything in its folder."""

    def file(self, name: str) -> ZooFile:
        """Return the file of that name in the model's own folder."""
        return next(file for file in self.files if file.name == name)

    @property
    def verified(self) -> list[ZooFile]:
        """The files of `VERIFIED`."""
        return [self.file(name) for name in VERIFIED]


class Manifest(Config):
    """All trained networks by name, `<data set>/<model>`."""

    models: dict[str, ZooModel]


def manifest() -> Manifest:
    """Return the packaged manifest."""
    packaged = parse(Manifest, json.loads(MANIFEST.read_text()), str(MANIFEST))
    for name, model in packaged.models.items():
        _check(name, model)
    return packaged


def _check(name: str, model: ZooModel) -> None:
    """Check that every file lies in the model's own folder and that the files for loading are listed."""
    outside = [file.path for file in model.files if not file.path.startswith(f"{name}/")]
    listed = {file.path for file in model.files}
    required = {f"{name}/{file}" for file in VERIFIED} | {*model.results}
    if outside or not required <= listed:
        wrong = f"{outside[0]} is not in {name}/" if outside else f"{min(required - listed)} is not listed"
        raise InputError(f"{MANIFEST} is damaged: {wrong}; reinstall robustfpd")


def names() -> list[str]:
    """Return the names of all models of this version's zoo."""
    return sorted(manifest().models)


def checkout() -> Path | None:
    """Return the repository's `models/` folder, when this package runs from a checkout."""
    root = Path(__file__).parents[3]
    return root / "models" if (root / "src") in Path(__file__).parents and (root / "pyproject.toml").is_file() else None


def cached() -> Path:
    """Return the folder of downloaded models; it may not exist."""
    return cache_folder() / "models"


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find(name: str) -> Path:
    """Return the folder of a model, verified; it is downloaded where needed.

    Args:
        name: one of `names()`.

    Returns:
        A folder with `model.safetensors`, `config.json` and the run's `config.yaml`, in the checkout or in the cache.

    Raises:
        InputError: an unknown name, or a file whose hash is not the manifest's.
        MissingDataError: the model is not there and cannot be downloaded.
    """
    model = _model(name)
    folder = checkout()
    if folder is not None and _complete(folder, model):
        _verify(folder, model, "restore it with git checkout, or enter what you trained with models/add.py")
        return folder / name
    url = os.environ.get(VARIABLE, "").strip()
    if url:
        _download(url, model)
    elif not _complete(cached(), model):
        searched = f"the checkout {folder / name}" if folder is not None else "no checkout (the package is installed)"
        raise MissingDataError(
            f"model {name!r} not found: looked in {searched}, then in the cache {cached() / name}, and "
            f"{VARIABLE} is not set; set it to the address of a copy of the repository's models/ folder (https or file)"
        )
    _verify(cached(), model, f"delete it and set {VARIABLE} to the address of a copy of the models/ folder")
    return cached() / name


def place(name: str) -> tuple[str, Path | None]:
    """Return where a model is and its folder, without a download.

    The place is `checkout` or `cache`, with `, damaged` where a hash differs, or `to be fetched`.
    """
    model = _model(name)
    for where, folder in (("checkout", checkout()), ("cache", cached())):
        if folder is not None and _complete(folder, model):
            intact = all(file.is_in(folder) for file in model.verified)
            return where if intact else f"{where}, damaged", folder / name
    return "to be fetched", None


def locate(given: str | Path) -> Path:
    """Return the folder to load from: `given` when it holds a model or a run, else the zoo's model of that name.

    Another path is returned unchanged.

    Raises:
        MissingDataError: there is no such folder, and the name resembles a model of the zoo.
    """
    path, name = Path(given), given if isinstance(given, str) else given.as_posix()
    folder = readable_folder(path)
    marks = (readable_folder(path / "checkpoints" / "best"), folder / CONFIG, folder / WEIGHTS, folder / SETTINGS)
    if any(mark.exists() for mark in marks):
        return path
    known = names()
    if name in known:
        return find(name)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.75)
    if near and name.count("/") == 1 and not path.exists():
        raise MissingDataError(
            f"no model in {path}: there is no such folder; did you mean {' or '.join(map(repr, near))}? "
            "These come with robustfpd, see robustfpd models"
        )
    return path


def named(folder: Path) -> str | None:
    """Return the name of the model whose folder this is, in the checkout or in the cache; None for other folders."""
    homes = [home for home in (checkout(), cached()) if home is not None]
    return next((n for n in names() if any((home / n).resolve() == folder.resolve() for home in homes)), None)


def _model(name: str) -> ZooModel:
    models = manifest().models
    if name not in models:
        raise unknown_name("model", name, models)
    return models[name]


def _complete(folder: Path, model: ZooModel) -> bool:
    return all((folder / file.path).is_file() for file in model.verified)


def _verify(folder: Path, model: ZooModel, advice: str) -> None:
    for file in model.verified:
        sha256 = digest(folder / file.path)
        if sha256 != file.sha256:
            raise InputError(
                f"{folder / file.path} is not the file that was measured: SHA-256 {file.sha256} is expected, found "
                f"{sha256}; {advice}"
            )


def _download(url: str, model: ZooModel) -> None:
    """Download the files that the cache lacks or holds damaged, unless all verified files are intact."""
    if all(file.is_in(cached()) for file in model.verified):
        return
    check_url(url, VARIABLE)
    for file in (*(f for f in model.files if f not in model.verified), *model.verified):
        if not file.is_in(cached()):
            download(f"{url.rstrip('/')}/{quote(file.path)}", cached() / file.path, file.sha256, file.size)
