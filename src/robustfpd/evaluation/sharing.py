"""Work shared by processes that must stay in step: what goes wrong on one ends all of them, with one message."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from robustfpd.errors import InputError, first_line
from robustfpd.processes import Processes

T = TypeVar("T")


def together(processes: Processes, action: Callable[[], T]) -> list[T]:
    """What the action gives on every process, by rank; all of them must call this.

    Raises:
        InputError: the action raised one on any process, or any other error where there are several.
    """
    if processes.size == 1:
        return [action()]
    error: InputError | None = None
    found: list[T] = []
    try:
        found.append(action())
    except InputError as raised:
        error = raised
    except Exception as raised:
        error = InputError(f"process {processes.rank}: {type(raised).__name__}: {first_line(raised)}")
    everywhere = processes.all((found, error))
    for _, raised_there in everywhere:
        if raised_there is not None:
            raise raised_there
    return [there[0] for there, _ in everywhere]


def by_first(processes: Processes, action: Callable[[], T]) -> T:
    """What the action gives on process 0, which alone does it; all of them must call this.

    Raises:
        InputError: as `together`.
    """
    return together(processes, lambda: action() if processes.first else None)[0]  # type: ignore[return-value]


def in_step(processes: Processes, action: Callable[[], T]) -> T:
    """What the action gives here, once it has given something on every process; all of them must call this.

    Raises:
        InputError: as `together`.
    """
    kept: list[T] = []
    together(processes, lambda: kept.append(action()))
    return kept[0]
