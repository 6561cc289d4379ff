"""Errors that a user can fix; the message names what was wrong, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An invalid input. The message is one line and needs no traceback."""


class MissingDataError(InputError):
    """Missing files. The message names the path and how to download them."""


class ReportedByOtherRank(InputError):
    """An error that another rank reports; the command line prints nothing for it."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def unknown_name(kind: str, name: object, choices: Iterable[str], *, listed: int = 12) -> InputError:
    """Return the error for a name that is not among `choices`; it suggests the nearest ones.

    Args:
        kind: what the name stands for ("recipe", "attack").
        name: the unknown name.
        choices: all valid names.
        listed: number of choices to list if none is near.
    """
    names = sorted(set(choices))
    near = difflib.get_close_matches(str(name), names, n=4, cutoff=0.5)
    similarity = [difflib.SequenceMatcher(None, str(name), choice).ratio() for choice in near]
    near = [n for n, ratio in zip(near, similarity, strict=True) if ratio > similarity[0] - 0.15]
    if near:
        return InputError(f"unknown {kind} {name!r}; did you mean {' or '.join(map(repr, near))}?")
    if not names:
        return InputError(f"unknown {kind} {name!r}; there are none to choose from")
    rest = f" and {len(names) - listed} more" if len(names) > listed else ""
    return InputError(f"unknown {kind} {name!r}; choose from {', '.join(names[:listed])}{rest}")
