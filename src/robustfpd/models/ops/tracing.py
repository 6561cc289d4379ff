"""What a pass runs under: whether somebody makes a program of it, and autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def traced(x: Tensor) -> bool:
    """Whether compilers, exporters or function transforms look on: they want plain operations, whatever the sizes."""
    stands_for_others = type(x) not in (Tensor, torch.nn.Parameter)
    watched = torch.compiler.is_compiling() or torch._C._is_tracing()
    return stands_for_others or watched or torch._C._are_functorch_transforms_active()


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Full precision for products on the device of `x`; not all devices have autocast."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def as_autocast(x: Tensor) -> Tensor:
    """`x` in the type that autocast would multiply it in, if it is on."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if on else x
