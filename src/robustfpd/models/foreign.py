"""Networks of the user's own, by name: `package.module:factory`.

To import a module runs it. A name is looked up among the packages that are installed here and in the folder one works
in, never in the folder that a saved model lies in: weights from elsewhere bring no code.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robustfpd.errors import InputError, first_line, unknown_name

if TYPE_CHECKING:
    from torch import nn


def is_foreign(backbone: str) -> bool:
    """Whether a backbone is named as `package.module:factory`."""
    return ":" in backbone


def find(given: str, what: str) -> tuple[str, str]:
    """Return module and name of `package.module:factory`; an InputError where there is no such module. Needs no torch.

    Args:
        given: what the user wrote.
        what: the flag or setting that he wrote it for.
    """
    place, _, name = given.partition(":")
    if not place or not name:
        raise InputError(f"{what} must be package.module:factory, found {given!r}")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    package = place.partition(".")[0]
    try:
        there = package in sys.modules or importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        there = False
    if not there:
        raise InputError(
            f"{place} cannot be imported from here: ModuleNotFoundError: there is no {package!r} in {Path.cwd()} or "
            "among the installed packages"
        )
    return place, name


def foreign(given: str, what: str = "--model") -> nn.Module:
    """Import `package.module:factory`, also from the folder one is in, and call it; a module is taken as it is.

    Raises:
        InputError: it cannot be imported or called, or gives no module.
    """
    from torch import nn

    place, name = find(given, what)
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
