"""How a network runs: device and precision, what `auto` means, and evaluation mode within a block.

The module imports torch only where it is used, so that the command line can check a name without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from robustfpd.config import DEVICES, PRECISIONS, Precision
from robustfpd.errors import InputError, first_line, unknown_name

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.nn.modules.batchnorm import _BatchNorm

TIMED_SECONDS = 0.5
"""How long `timed` repeats."""
BF16_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs with bfloat16 tensor cores (Ampere)."""


def check_device_name(name: str) -> None:
    """Raise an InputError unless `name` is auto, cpu, cuda, mps, or one with an index as in cuda:1."""
    kind, separator, index = name.partition(":")
    if kind not in DEVICES:
        raise unknown_name("device", kind, DEVICES)
    if separator and not index.isdecimal():
        raise InputError(f"device takes {', '.join(DEVICES)}, or an index as in cuda:1; found {name!r}")


def device_name(name: str = "auto", world_size: int = 1) -> str:
    """Return `name`, or for `auto` the best device type here: cuda, then mps, then cpu.

    Args:
        name: `auto`, `cpu`, `cuda`, `mps`, or one with an index (`cuda:1`).
        world_size: number of ranks; several ranks run on cpu, or on cuda, each on the GPU of its local rank.

    Raises:
        InputError: an unknown device, or one that several ranks cannot use.
    """
    import torch

    check_device_name(name)
    if world_size > 1 and name not in ("auto", "cpu", "cuda"):
        raise InputError(
            f"{world_size} processes run on cpu, or on a GPU each with cuda, found device {name!r}; "
            "leave out --device, or start one process"
        )
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if world_size == 1 and torch.backends.mps.is_available() else "cpu"


def resolve_device(name: str = "auto", world_size: int = 1) -> torch.device:
    """Return the device that `device_name` gives, after a test allocation on it.

    Raises:
        InputError: as for `device_name`, or the allocation fails.
    """
    import torch

    chosen = device_name(name, world_size)
    try:
        device = torch.device(chosen)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {name!r} cannot be used here ({first_line(error)}); use --device cpu, or leave it out"
        ) from None
    return device


def resolve_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """Return `precision`, or for `auto` bf16 where the device supports it in hardware, else fp32.

    Raises:
        InputError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    return "bf16" if supports_bf16(device) else "fp32"


def supports_bf16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 in hardware: AMX, AVX512-BF16 or tensor cores."""
    import torch

    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= BF16_CAPABILITY


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode; on exit every submodule gets its own mode back.

    `module.eval()` followed by `module.train()` would put parts in training mode that the user had frozen.
    """
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in before:
            m.training = training


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds of several calls of `action`, after one to warm up."""
    import torch

    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds[1:]) < TIMED_SECONDS:
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


class FrozenStatistics:
    """Keeps the running statistics of batch norms during forward passes in training mode.

    Can be entered again: with a retained graph each backward pass recomputes checkpointed activations.
    """

    def __init__(self, norms: Sequence[_BatchNorm]) -> None:
        self.norms = norms
        self.before: list[tuple[float | None, torch.Tensor | None]] = []

    def __enter__(self) -> None:
        counts = [norm.num_batches_tracked for norm in self.norms]
        self.before = [(n.momentum, None if c is None else c.clone()) for n, c in zip(self.norms, counts, strict=True)]
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *_: object) -> None:
        for norm, (momentum, count) in zip(self.norms, self.before, strict=True):
            norm.momentum = momentum
            if count is not None:
                assert norm.num_batches_tracked is not None
                norm.num_batches_tracked.copy_(count)
