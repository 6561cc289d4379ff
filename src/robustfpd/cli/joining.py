"""Commands that several processes share from their beginning to their end: who talks, which GPU is whose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from robustfpd.errors import InputError, ToldElsewhere
from robustfpd.launched import Launched

if TYPE_CHECKING:
    from robustfpd.processes import Processes


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The processes that share the command, as a group for as long as it lasts."""
    import torch.distributed as dist

    from robustfpd.together import join

    group_was_there = dist.is_initialized()
    try:
        yield join(device)
    finally:
        if dist.is_initialized() and not group_was_there:
            dist.destroy_process_group()


@contextmanager
def told_once() -> Iterator[None]:
    """Let process 0 alone tell what the user can mend, where all find the same."""
    try:
        yield
    except InputError as error:
        if Launched.now().first:
            raise
        raise ToldElsewhere(str(error)) from None


def own_device(name: str) -> str:
    """The GPU of this process where several share a machine and no other device was asked for."""
    import torch

    launched = Launched.now()
    several = launched.size > 1 and torch.cuda.is_available() and name in ("auto", "cuda")
    return f"cuda:{launched.local_rank % torch.cuda.device_count()}" if several else name
