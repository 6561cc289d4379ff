"""Whether a pass computes numbers, or is watched by somebody who makes a program of it."""

from __future__ import annotations

import torch
from torch import Tensor


def traced(x: Tensor) -> bool:
    """Whether compilers, exporters or function transforms look on: they want plain operations, whatever the sizes."""
    stands_for_others = type(x) not in (Tensor, torch.nn.Parameter)
    return stands_for_others or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
