"""Networks of the user's own, by import path: `package.module:factory`.

Importing a module runs its code, and calling the factory runs more. A path that the user typed is imported from the
installed packages or the working folder; one that a saved model names only where the user trusts it. torchvision's
networks need no trust, but then the working folder is not searched: it may belong to the model.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustfpd.errors import InputError, first_line, unknown_name

if TYPE_CHECKING:
    from torch import nn


def is_import_path(backbone: str) -> bool:
    """Return whether a backbone is given as `package.module:factory`."""
    return ":" in backbone


def needs_trust(backbone: str) -> bool:
    """Return whether a saved model of this backbone is loaded with `trust_code` only."""
    # torchvision's functions only build networks.
    return is_import_path(backbone) and backbone.partition(":")[0] != "torchvision.models"


def check_trusted(backbone: str, folder: Path) -> None:
    """Raise an InputError for the backbone of a saved model that needs trust."""
    if needs_trust(backbone):
        raise InputError(
            f"the network in {folder} is made by {backbone}; loading executes that code: if you trust it, repeat with "
            "--trust-code (in Python trust_code=True), or pass net="
        )


@contextmanager
def _search_path(from_cwd: bool) -> Iterator[None]:
    """Append the working folder to the places where modules are looked for; or, without `from_cwd`, remove it."""
    cwd = str(Path.cwd())
    before = list(sys.path)
    if not from_cwd:
        sys.path[:] = [entry for entry in before if entry and Path(entry).absolute() != Path(cwd)]
        try:
            yield
        finally:
            sys.path[:] = before
        return
    added = "" not in before and cwd not in before
    if added:
        sys.path.append(cwd)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        if added and cwd in sys.path:  # imported code may have changed the path: only our entry, the last, goes
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(cwd)]


def find(path: str, option: str, *, from_cwd: bool = True) -> tuple[str, str]:
    """Split `package.module:factory` into module and name, without importing it. Needs no torch.

    `option` is the flag or setting that it was given for; `from_cwd` looks in the working folder too. Raises an
    InputError for another form or an unknown package.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise InputError(f"{option} must be package.module:factory, found {path!r}")
    package = module.partition(".")[0]
    with _search_path(from_cwd):
        try:
            exists = package in sys.modules or importlib.util.find_spec(package) is not None
        except (ImportError, ValueError):
            exists = False
    if not exists:
        places = f"in {Path.cwd()} or " if from_cwd else ""
        raise InputError(
            f"{module} cannot be imported from here: ModuleNotFoundError: there is no {package!r} {places}among the "
            "installed packages"
        )
    return module, name


def import_model(path: str, option: str = "--model", *, from_cwd: bool = True) -> nn.Module:
    """Import `package.module:factory` and call it; a name that is a `torch.nn.Module` already is returned.

    Args are those of `find`. Raises an InputError if the import or the call fails, or returns something else.
    """
    from torch import nn

    module_name, name = find(path, option, from_cwd=from_cwd)
    with _search_path(from_cwd):  # around the call too: a function may import its neighbours
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # the user's module may raise anything
            raise InputError(
                f"{module_name} cannot be imported from here: {type(error).__name__}: {first_line(error)}"
            ) from error
        if not hasattr(module, name):
            raise unknown_name(f"name in {module_name}", name, [n for n in vars(module) if not n.startswith("_")])
        net: Any = getattr(module, name)
        if isinstance(net, nn.Module):
            return net
        if not callable(net):
            found = type(net).__name__
            raise InputError(f"{path} must be a torch.nn.Module or a function that returns one, found {found}")
        try:
            net = net()
        except Exception as error:
            raise InputError(f"{path}() raised {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(net, nn.Module):
        raise InputError(f"{path}() must return a torch.nn.Module, found {type(net).__name__}")
    return net
