"""Trained networks that come with robustfpd: in the checkout's `models/` folder, or fetched from a copy of it.

The packaged manifest names each file with its hash, so a network is the one that was measured wherever it comes from.
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
"""Address of a copy of the `models/` folder; there is none by default."""
SETTINGS = "config.yaml"
"""The run's settings, beside the model."""
VERIFIED = (SETTINGS, CONFIG, WEIGHTS)
"""Files that are checked at each use; the card and the results are for reading. Weights come last: they complete it."""
LARGEST = 5_000_000
"""Bytes that one file may have."""
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


class ZooModel(Config):
    """One trained network."""

    description: str
    """One line."""
    recipe: str
    """What it was trained by."""
    dataset: str
    """What it was trained on."""
    defence: str
    """`fpd` or `none`."""
    training: str
    """Its last stage of training, in a few words."""
    results: tuple[str, ...] = ()
    """Paths of its evaluation records; the first is the one to show."""
    files: tuple[ZooFile, ...]
    """Everything in its folder."""

    def file(self, name: str) -> ZooFile:
        """The file of that name in the model's own folder."""
        return next(file for file in self.files if file.name == name)


class Manifest(Config):
    """All trained networks by name, `<data set>/<model>`."""

    models: dict[str, ZooModel]


def manifest() -> Manifest:
    """The packaged manifest."""
    read = parse(Manifest, json.loads(MANIFEST.read_text()), str(MANIFEST))
    for name, model in read.models.items():
        _check(name, model)
    return read


def _check(name: str, model: ZooModel) -> None:
    """Every file lies in the model's own folder, and what loading needs is listed."""
    outside = [file.path for file in model.files if not file.path.startswith(f"{name}/")]
    listed = {file.path for file in model.files}
    lacking = {f"{name}/{needed}" for needed in VERIFIED} | {*model.results}
    if outside or not lacking <= listed:
        wrong = f"{outside[0]} is not in {name}/" if outside else f"{min(lacking - listed)} is not listed"
        raise InputError(f"{MANIFEST} is damaged: {wrong}; install robustfpd anew")


def names() -> list[str]:
    """Names of all trained networks that come with this version."""
    return sorted(manifest().models)


def checkout() -> Path | None:
    """The repository's `models/` folder, when this package runs from a checkout."""
    root = Path(__file__).parents[3]
    return root / "models" if (root / "src") in Path(__file__).parents and (root / "pyproject.toml").is_file() else None


def cached() -> Path:
    """Where fetched networks are kept; it may not exist."""
    return cache_folder() / "models"


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find(name: str) -> Path:
    """Return the folder of a trained network, verified; it is fetched when it is not at hand.

    Args:
        name: one of `names()`.

    Returns:
        A folder with `model.safetensors`, `config.json` and the run's `config.yaml`, in the checkout or in the cache.

    Raises:
        InputError: an unknown name, or a file that is not the one of the manifest.
        MissingDataError: it is neither at hand nor can it be fetched.
    """
    model = _described(name)
    folder = checkout()
    if folder is not None and _complete(folder, model):
        _verify(folder, model, "restore it with git checkout, or enter what you trained with models/add.py")
        return folder / name
    address = os.environ.get(VARIABLE, "").strip()
    if address:
        _fetch(address, model)
    elif not _complete(cached(), model):
        raise MissingDataError(
            f"model {name!r} is not at hand: looked in {_said(folder, name)}, then in the cache {cached() / name}, and "
            f"{VARIABLE} is not set; set it to the address of a copy of the repository's models/ folder (https or file)"
        )
    _verify(cached(), model, f"delete it and set {VARIABLE} to the address of a copy of the models/ folder")
    return cached() / name


def place(name: str) -> tuple[str, Path | None]:
    """Say where a network is, without fetching it: `checkout`, `cache`, perhaps `damaged`, or `to be fetched`."""
    model = _described(name)
    for said, folder in (("checkout", checkout()), ("cache", cached())):
        if folder is not None and _complete(folder, model):
            right = all(digest(folder / model.file(n).path) == model.file(n).sha256 for n in VERIFIED)
            return said if right else f"{said}, damaged", folder / name
    return "to be fetched", None


def locate(given: str | Path) -> Path:
    """Return the folder to load from: `given` when it holds a model or a run, else the trained network of that name.

    A path that is neither comes back as it is, unless it looks like the name of a trained network.
    """
    path, name = Path(given), given if isinstance(given, str) else given.as_posix()
    inside = readable_folder(path)
    signs = (readable_folder(path / "checkpoints" / "best"), inside / CONFIG, inside / WEIGHTS, inside / SETTINGS)
    if any(sign.exists() for sign in signs):
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
    """The trained network whose folder this is, in the checkout or in the cache; None for any other folder."""
    homes = [home for home in (checkout(), cached()) if home is not None]
    return next((n for n in names() if any((home / n).resolve() == folder.resolve() for home in homes)), None)


def _described(name: str) -> ZooModel:
    models = manifest().models
    if name not in models:
        raise unknown_name("model", name, models)
    return models[name]


def _said(folder: Path | None, name: str) -> str:
    return f"the checkout {folder / name}" if folder is not None else "no checkout (the package is installed)"


def _complete(folder: Path, model: ZooModel) -> bool:
    return all((folder / model.file(name).path).is_file() for name in VERIFIED)


def _verify(folder: Path, model: ZooModel, advice: str) -> None:
    for name in VERIFIED:
        file = model.file(name)
        path = folder / file.path
        found = digest(path)
        if found != file.sha256:
            raise InputError(
                f"{path} is not the file that was measured: SHA-256 {file.sha256} is expected, found {found}; {advice}"
            )


def _fetch(address: str, model: ZooModel) -> None:
    """Fetch what the cache lacks or holds damaged, unless what is verified is right already."""

    def right(file: ZooFile) -> bool:
        path = cached() / file.path
        return path.is_file() and digest(path) == file.sha256

    if all(right(model.file(name)) for name in VERIFIED):
        return
    check_url(address, VARIABLE)
    last = [model.file(name) for name in VERIFIED]
    for file in (*(f for f in model.files if f not in last), *last):
        if not right(file):
            download(f"{address.rstrip('/')}/{quote(file.path)}", cached() / file.path, file.sha256, file.size)
