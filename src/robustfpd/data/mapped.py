"""Files mapped into memory that count as this process's own memory only while they are read."""

from __future__ import annotations

import mmap
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_mappings: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()
"""By the address of the first byte; each lives as long as the tensors that show it."""


def mapped(path: Path, size: int) -> Tensor:
    """The first `size` bytes of a file, uint8, to be read: what is written there is lost, and never in the file."""
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    data = torch.frombuffer(mapping, dtype=torch.uint8)
    _mappings[data.data_ptr()] = mapping
    return data


def let_go(data: Tensor) -> None:
    """Let pages that were read of a mapped file no longer count as this process's; the kernel still has them.

    Otherwise an epoch would make the whole file resident, and a job with a limit of memory would be ended for it. To
    read on costs no disk, only the pages' entries in a table. Other tensors are left as they are.
    """
    mapping = _mappings.get(data.untyped_storage().data_ptr())
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)
