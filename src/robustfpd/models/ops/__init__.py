"""Fast equivalents of the literal layers, tested equal to them, and the choice between the two."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Means = Callable[..., Tensor]
"""Non-local means, (x N×C×H×W, *, residual=False) → N×C×H×W, plus x with `residual`."""


def traced(x: Tensor) -> bool:
    """Return whether a compiler, an exporter or a function transform records the operations on `x`.

    They need plain operations: the literal code.
    """
    subclass = type(x) not in (Tensor, torch.nn.Parameter)
    recording = torch.compiler.is_compiling() or torch._C._is_tracing()
    return subclass or recording or torch._C._are_functorch_transforms_active()


def computed_by(fast: Means) -> Callable[[Means], Means]:
    """Decorate a literal function so that `fast` computes it, except where it is traced.

    The literal function stays available as `__wrapped__`.
    """

    def decorate(literal: Means) -> Means:
        @functools.wraps(literal)
        def dispatch(x: Tensor, *, residual: bool = False) -> Tensor:
            return (literal if traced(x) else fast)(x, residual=residual)

        return dispatch

    return decorate


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast on the device of `x`, where that device has it."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def as_autocast(x: Tensor) -> Tensor:
    """Cast `x` to autocast's type where autocast is on."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if enabled else x
