"""The time limit of an evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from robustfpd.distributed import ProcessGroup


class TimeLimitReached(BaseException):
    """The evaluation ends here. Not an Exception, which a check reports as an error of the classifier."""


class TimeLimit:
    """Decides when an evaluation ends early; the clock of rank 0 decides for all ranks.

    Args:
        minutes: time from now; None for no limit.
        group: ranks of the evaluation.
    """

    def __init__(self, minutes: float | None, group: ProcessGroup) -> None:
        self._group = group
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self.reason = "" if minutes is None else f"after its limit of {minutes:g} minutes"
        """Why the evaluation ends, to be put after `ended`."""
        self._reached = False

    def reached(self) -> bool:
        """Return whether the evaluation must end. Every rank must call it in the same order."""
        if self._end is not None and not self._reached:
            self._reached = self._group.broadcast(time.monotonic() >= self._end)
        return self._reached

    def check(self) -> None:
        """Raise TimeLimitReached if the evaluation must end. Every rank must call it in the same order."""
        if self.reached():
            raise TimeLimitReached

    @contextmanager
    def interrupting(self, *modules: nn.Module) -> Iterator[None]:
        """Raise TimeLimitReached in the first pass of a module after the limit; with several ranks, do nothing."""

        def before(module: nn.Module, arguments: object) -> None:
            self.check()

        alone = self._end is not None and self._group.world_size == 1
        hooks = [module.register_forward_pre_hook(before) for module in {*modules}] if alone else []
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def end_now(self, reason: str) -> None:
        """End the evaluation now, before its limit."""
        self._reached, self.reason = True, reason
