"""Networks of the user's own, by name: `package.module:factory`.

To import a module runs it, and to call what it holds runs that too. So a name that the user typed is imported, from the
packages that are installed here or from the folder one works in; a name that a saved model tells only where the user
trusts it. Torchvision's networks need no trust, but then the folder one works in is not looked at: it may be the
model's.
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

HARMLESS = "torchvision.models"
"""A module whose functions only build networks."""


def is_foreign(backbone: str) -> bool:
    """Whether a backbone is named as `package.module:factory`."""
    return ":" in backbone


def needs_trust(backbone: str) -> bool:
    """Whether a saved model of this backbone is loaded only with `trust_code`."""
    return is_foreign(backbone) and backbone.partition(":")[0] != HARMLESS


def check_trusted(backbone: str, folder: Path) -> None:
    """Refuse a backbone that a saved model names, unless its code does no harm."""
    if needs_trust(backbone):
        raise InputError(
            f"the network in {folder} is made by {backbone}; loading it runs that code: if it is yours, repeat with "
            "--trust-code (in Python trust_code=True), or pass net="
        )


@contextmanager
def _path(here: bool) -> Iterator[None]:
    """Look for modules in the folder one is in too, after all other places; or, where `here` is false, not there."""
    cwd = str(Path.cwd())
    before = list(sys.path)
    if not here:
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
        if added and cwd in sys.path:  # what was imported may have changed the path: only our entry goes
            sys.path.reverse()
            sys.path.remove(cwd)
            sys.path.reverse()


def find(given: str, what: str, here: bool = True) -> tuple[str, str]:
    """Return module and name of `package.module:factory`; an InputError where there is no such module. Needs no torch.

    Args:
        given: what the user wrote.
        what: the flag or setting that he wrote it for.
        here: look in the folder one is in too.
    """
    place, _, name = given.partition(":")
    if not place or not name:
        raise InputError(f"{what} must be package.module:factory, found {given!r}")
    package = place.partition(".")[0]
    with _path(here):
        try:
            there = package in sys.modules or importlib.util.find_spec(package) is not None
        except (ImportError, ValueError):
            there = False
    if not there:
        places = f"in {Path.cwd()} or " if here else ""
        raise InputError(
            f"{place} cannot be imported from here: ModuleNotFoundError: there is no {package!r} {places}among the "
            "installed packages"
        )
    return place, name


def foreign(given: str, what: str = "--model", here: bool = True) -> nn.Module:
    """Import `package.module:factory` and call it; a module is taken as it is.

    Args:
        given: what the user wrote, or what he trusts.
        what: the flag or setting that he wrote it for.
        here: look in the folder one is in too.

    Raises:
        InputError: it cannot be imported or called, or gives no module.
    """
    place, name = find(given, what, here)
    with _path(here):  # around the call too: a function may import what lies beside it
        return _made(given, place, name)


def _made(given: str, place: str, name: str) -> nn.Module:
    from torch import nn

    try:
        module = importlib.import_module(place)
    except Exception as error:  # a module of the user's may raise anything
        raise InputError(
            f"{place} cannot be imported from here: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not hasattr(module, name):
        raise unknown_name(f"name in {place}", name, [n for n in vars(module) if not n.startswith("_")])
    found: Any = getattr(module, name)
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
