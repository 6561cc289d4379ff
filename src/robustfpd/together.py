"""Several processes at one job: how they meet, and how an error of any of them ends all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from robustfpd.errors import InputError, ReportedByOtherRank, first_line
from robustfpd.launched import Launched
from robustfpd.processes import Processes

PATIENCE = timedelta(minutes=30)
"""How long processes wait for one another before they give up."""


def join(device: str = "auto", patience: timedelta = PATIENCE) -> Processes:
    """Meet the other processes that torchrun or srun started, once; a process that is alone stays so.

    Args:
        patience: how long processes wait for one another, now and later.
        device: `auto`, `cpu` or `cuda`; GPUs are taken by the processes' numbers on their node.

    Raises:
        InputError: fewer GPUs than processes on this node, a device that several processes cannot have, or nobody to
            be met.
    """
    launched = Launched.now()
    if launched.size == 1 or dist.is_initialized():
        return Processes.now()
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind not in ("cpu", "cuda"):
        raise InputError(
            f"{launched.size} processes run on cpu, or on a GPU each with cuda, found device {device!r}; "
            "leave out --device, or start one process"
        )
    if kind == "cuda":
        _take_gpu(launched)
    _tell_torch(launched)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, rank=launched.rank, world_size=launched.size, timeout=patience)
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(
            f"process {launched.rank} of {launched.size} could not meet the others at {place}: {first_line(error)}"
        ) from None
    return Processes.now()


@contextmanager
def errors_shared() -> Iterator[None]:
    """Let an error of the user's in any process be raised in all, at the end of the block, which all must enter.

    In the block no process may wait for another: those that failed no longer answer. The first process that failed
    raises what it found, the others `ReportedByOtherRank`.
    """
    found: InputError | OSError | None = None
    try:
        yield
    except (InputError, OSError) as error:
        found = error
    failed = Processes.now().all(found is not None)
    if True not in failed:
        return
    if found is not None and failed.index(True) == Processes.now().rank:
        raise found
    raise ReportedByOtherRank(f"process {failed.index(True)} ended with an error") from None


def _take_gpu(launched: Launched) -> None:
    count = torch.cuda.device_count()
    if count < launched.local_size:
        raise InputError(
            f"{launched.local_size} processes on this node see {count} GPUs, and need one each; start fewer with "
            f"{'--nproc-per-node' if launched.by == 'torchrun' else '--ntasks-per-node'}, let each see all "
            "(SLURM: --gpus-per-node, not --gpus-per-task), or take --device cpu"
        )
    torch.cuda.set_device(launched.local_rank)


def _tell_torch(launched: Launched) -> None:
    """Give torch and Fabric what torchrun would have given them."""
    if launched.by == "torchrun":
        return
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
    os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    # Jobs that share a node, and steps of one job, must not meet at one port.
    number = 7 * int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ.get("SLURM_STEP_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(15000 + number % 10000))
    for name, value in (
        ("RANK", launched.rank), ("WORLD_SIZE", launched.size), ("LOCAL_RANK", launched.local_rank),
        ("LOCAL_WORLD_SIZE", launched.local_size), ("GROUP_RANK", launched.rank // launched.local_size),
    ):  # fmt: skip
        os.environ[name] = str(value)
