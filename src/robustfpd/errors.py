"""Errors that a user can act on: what was wrong, what was found, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CLEARLY = 0.15
"""Likeness by which the nearest name must be ahead for the others not to be offered."""


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line and needs no traceback."""


class MissingDataError(InputError):
    """Files that should be there are not. The message says where was looked and how to fetch them."""


class ReportedByOtherRank(InputError):
    """An error that another rank reports; the command line prints nothing for it."""


def first_line(error: Exception) -> str:
    """The first line of what `error` says, or its kind when it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def unknown_name(kind: str, found: object, choices: Iterable[str], *, listed: int = 12) -> InputError:
    """Return the error for a name that is not among `choices`, nearest choices first.

    Args:
        kind: what was looked up, in the user's words ("recipe", "attack").
        found: what the user gave.
        choices: all valid names.
        listed: how many choices to list when nothing is near.
    """
    names = sorted(set(choices))
    near = difflib.get_close_matches(str(found), names, n=4, cutoff=0.5)
    alike = [difflib.SequenceMatcher(None, str(found), name).ratio() for name in near]
    near = [name for name, ratio in zip(near, alike, strict=True) if ratio > alike[0] - CLEARLY]
    if near:
        return InputError(f"unknown {kind} {found!r}; did you mean {' or '.join(map(repr, near))}?")
    if not names:
        return InputError(f"unknown {kind} {found!r}; there are none to choose from")
    rest = f" and {len(names) - listed} more" if len(names) > listed else ""
    return InputError(f"unknown {kind} {found!r}; choose from {', '.join(names[:listed])}{rest}")
