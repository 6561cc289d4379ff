"""Evaluation mode for a while, without losing what was set before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every submodule in evaluation mode; on leaving, give each its own flag back.

    `module.eval()` followed by `module.train()` would switch on what the user had frozen.
    """
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in before:
            m.training = training
