"""Commands that several processes share: who started them, who talks, which GPU is whose."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from robustfpd.errors import InputError

if TYPE_CHECKING:
    from robustfpd.processes import Processes


def started() -> tuple[int, int]:
    """Rank of this process and how many torchrun or SLURM started; 0 and 1 where it is alone. Needs no torch."""
    given = os.environ
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        # An interactive shell of SLURM has these too, but starts its commands once.
        if rank in given and size in given and (rank == "RANK" or given.get("SLURM_STEP_ID", "").isdecimal()):
            return int(given[rank]), int(given[size])
    return 0, 1


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that share the command, as a group for as long as it lasts.

    They tell each other small things only, so that gloo serves on GPUs as well.
    """
    import torch.distributed as dist

    from robustfpd.processes import Processes

    rank, size = started()
    if size == 1 or dist.is_initialized():
        yield Processes.now()
        return
    if "MASTER_ADDR" not in os.environ:  # SLURM's `node[03-07],other`: the first of these leads
        first = re.sub(r"\[(\d+)[^\]]*\]", r"\1", os.environ.get("SLURM_NODELIST", "127.0.0.1")).split(",")[0]
        os.environ["MASTER_ADDR"] = first
        os.environ.setdefault("MASTER_PORT", str(15000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 10000))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        yield Processes.now()
    finally:
        dist.destroy_process_group()


@contextmanager
def told_once() -> Iterator[None]:
    """Let process 0 alone tell what the user can mend; the others end as quietly as it ends loudly."""
    try:
        yield
    except InputError:
        if started()[0] == 0:
            raise
        raise SystemExit(2) from None


def own_device(name: str) -> str:
    """The GPU of this process where several share a machine and no other device was asked for."""
    import torch

    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    several = started()[1] > 1 and torch.cuda.is_available() and name in ("auto", "cuda")
    return f"cuda:{int(local) % torch.cuda.device_count()}" if several else name
