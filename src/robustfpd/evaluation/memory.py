"""How many images are attacked as a block, and how many of these go through the classifier at once."""

from __future__ import annotations

import torch
from torch import Tensor

from robustfpd.attacks import get
from robustfpd.evaluation.suites import AttackSpec

SMALLEST_BLOCK, LARGEST_BLOCK = 64, 256
BLOCKS = 4
"""An evaluation of few images still has so many blocks, for as many processes."""
ON_CPU = 64
"""More images at once are no faster on a CPU."""
VALUES_ON_CPU = 1 << 20
"""Pixels that go through a network at once on a CPU: its features take hundreds of times their memory."""
_SIGNS = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed")


def block_size(images: int, batch_size: int | None) -> int:
    """Images that are attacked together, written together, and dealt out to processes as one.

    It follows from what was asked for alone, not from processes, machine or the batch size that was found.
    """
    return max(min(max(-(-images // BLOCKS), SMALLEST_BLOCK), LARGEST_BLOCK), batch_size or 1)


def found_batch_size(images: Tensor, device: torch.device, block: int) -> int:
    """The batch size to begin with: a whole block on a GPU, halved where it does not fit; on a CPU what serves well."""
    if device.type == "cuda":
        return block
    fits = max(VALUES_ON_CPU // images[0].numel(), 1)
    return min(1 << (fits.bit_length() - 1), ON_CPU, block)


def is_out_of_memory(error: Exception) -> bool:
    """Whether fewer images at once may help."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def refills(planned: AttackSpec) -> bool:
    """Whether the attack takes a whole block and keeps its batches full by itself."""
    return "batch_size" in get(planned.attack).options


def make_room(device: torch.device) -> None:
    """Give back what a failed attempt held."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
