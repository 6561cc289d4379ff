"""Distributed training and evaluation: launch environment, collectives, shared errors.

torch is imported only where it is used, so that the command line starts without it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from robustfpd.device import device_name
from robustfpd.errors import InputError, ReportedByOtherRank, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class LaunchEnvironment:
    """Rank and world size of this process, from the environment variables of torchrun or srun."""

    launcher: Literal["none", "torchrun", "srun"] = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank on this node; the index of its GPU."""
    local_world_size: int = 1
    """Number of ranks on each node."""

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> LaunchEnvironment:
        """Read the launcher's variables.

        Raises:
            InputError: the nodes have different numbers of ranks.
        """
        if "TORCHELASTIC_RUN_ID" in variables:  # torchrun inside srun counts as torchrun
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            environment = cls("torchrun", *(int(variables[name]) for name in names))
        else:  # a batch script itself has SLURM_NTASKS; only processes that srun started have a step
            world_size = int(variables.get("SLURM_STEP_NUM_TASKS", "1"))
            if world_size == 1:
                return cls()
            nodes = int(variables.get("SLURM_STEP_NUM_NODES", "1"))
            local_world_size = 0 if world_size % nodes else world_size // nodes
            rank, local_rank = int(variables["SLURM_PROCID"]), int(variables["SLURM_LOCALID"])
            environment = cls("srun", rank, world_size, local_rank, local_world_size)
        if environment.local_world_size < 1 or environment.world_size % environment.local_world_size:
            raise InputError(
                f"{environment.launcher} started {environment.world_size} processes, not as many on each node; give "
                "each node the same number (torchrun --nproc-per-node, srun --ntasks-per-node)"
            )
        return environment

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.world_size // self.local_world_size


@dataclass(frozen=True)
class ProcessGroup:
    """Rank and world size in torch's process group, and collectives, which every rank must call in the same order.

    With one rank, collectives return their argument.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def current(cls) -> ProcessGroup:
        """Return torch's default process group; a single rank if it is not initialised."""
        dist = sys.modules.get("torch.distributed")
        if dist is not None and dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes files and prints."""
        return self.rank == 0

    def shard(self, count: int) -> slice:
        """Return the slice of `count` items for this rank; the slices differ in size by at most one."""
        size, remainder = divmod(count, self.world_size)
        start = self.rank * size + min(self.rank, remainder)
        return slice(start, start + size + (self.rank < remainder))

    @property
    def batch_shard(self) -> slice:
        """Slice of a batch for this rank: every `world_size`-th image, so that each half is sharded as well."""
        return slice(self.rank, None, self.world_size)

    @property
    def seed_purpose(self) -> tuple[str | int, ...]:
        """Purpose for `rng.derive` that gives each rank its own random numbers; empty on rank 0."""
        return ("process", self.rank) if self.rank else ()

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, ordered by rank, on every rank. Values are pickled."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank. The value is pickled."""
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def run_on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 and return its value, or raise its error, on every rank."""
        with shared_errors():
            value = function() if self.is_main else None
        return self.broadcast(value)  # type: ignore[return-value]

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of `tensor` over all ranks, detached, with equal bits on every rank."""
        mean = tensor.detach().clone()
        self.all_reduce_mean_([mean])
        return mean

    def all_reduce_mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all ranks, with a single all-reduce."""
        if self.world_size == 1 or not tensors:
            return
        import torch

        with torch.no_grad():
            total = torch.cat([tensor.reshape(-1) for tensor in tensors])
            torch.distributed.all_reduce(total)
            means = torch.split(total / self.world_size, [tensor.numel() for tensor in tensors])
            for tensor, mean in zip(tensors, means, strict=True):
                tensor.copy_(mean.view_as(tensor))

    def check_equal(self, values: Mapping[str, Any]) -> None:
        """Raise an InputError that lists the names whose values differ between ranks."""
        with shared_errors():
            gathered = self.gather(dict(values))
            different = [name for name in values if any(other[name] != gathered[0][name] for other in gathered)]
            if different:
                raise InputError(
                    f"the ranks were given different {', '.join(different)}; start all of them with the same arguments "
                    "(several seeds are several commands)"
                )


SINGLE_PROCESS = ProcessGroup()
"""The group of a single rank."""


def init_process_group(device: str = "auto", timeout: timedelta = timedelta(minutes=30)) -> ProcessGroup:
    """Initialise torch's process group if torchrun or srun started several processes, and return it.

    Args:
        device: `auto`, `cpu` or `cuda`; with `cuda` each rank takes the GPU of its local rank.
        timeout: timeout of the connection and of later collectives.

    Raises:
        InputError: fewer GPUs than ranks on this node, a device that several ranks cannot use, or a timeout;
            `ReportedByOtherRank` unless the local rank is 0.
    """
    environment = LaunchEnvironment.read()
    if environment.world_size == 1:
        return ProcessGroup.current()
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return ProcessGroup.current()
    error_type = ReportedByOtherRank if environment.local_rank else InputError  # one message for each node
    try:
        backend = "gloo"
        if device_name(device, environment.world_size) != "cpu":
            gpus = torch.cuda.device_count()
            if gpus < environment.local_world_size:
                raise InputError(
                    f"{environment.local_world_size} processes on this node see {gpus} GPUs, and need one each; start "
                    f"fewer with {'--nproc' if environment.launcher == 'torchrun' else '--ntasks'}-per-node, let each "
                    "see all (SLURM: --gpus-per-node, not --gpus-per-task), or use --device cpu"
                )
            torch.cuda.set_device(environment.local_rank)
            backend = "cpu:gloo,cuda:nccl"
        _export_variables(environment)
        dist.init_process_group(backend, rank=environment.rank, world_size=environment.world_size, timeout=timeout)
    except InputError as error:
        raise error_type(str(error)) from None
    except (RuntimeError, ValueError) as error:
        raise error_type(
            f"rank {environment.rank} of {environment.world_size} could not connect to the others at "
            f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: {first_line(error)}"
        ) from None
    return ProcessGroup.current()


def _export_variables(environment: LaunchEnvironment) -> None:
    """Under srun, set the variables of torchrun, which torch and Fabric read."""
    if environment.launcher == "torchrun":
        return
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
    os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    # Jobs that share a node, and steps of one job, need different ports.
    number = 7 * int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ.get("SLURM_STEP_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(15000 + number % 10000))
    variables = {
        "RANK": environment.rank, "WORLD_SIZE": environment.world_size, "LOCAL_RANK": environment.local_rank,
        "LOCAL_WORLD_SIZE": environment.local_world_size,
        "GROUP_RANK": environment.rank // environment.local_world_size,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in variables.items()})


@contextmanager
def shared_errors() -> Iterator[None]:
    """Raise an error of any rank on all ranks at the end of the block, which every rank must enter.

    The lowest rank that failed raises its own error, the others raise `ReportedByOtherRank`. The block must not
    contain a collective that only some ranks reach: a failed rank skips it. Blocks may be nested.
    """
    group = ProcessGroup.current()
    if group.world_size == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    own = error is not None and not isinstance(error, ReportedByOtherRank)
    messages = group.gather(f"{type(error).__name__}: {first_line(error)}" if error is not None and own else None)
    failed = next((rank for rank, message in enumerate(messages) if message is not None), None)
    if error is not None and failed in (None, group.rank):
        raise error
    if failed is not None:
        raise ReportedByOtherRank(f"rank {failed} failed: {messages[failed]}") from None


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, the signal of torchrun and SLURM to end a process."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except RuntimeError:
        if LaunchEnvironment.read().world_size > 1:
            time.sleep(1)  # a collective fails when a signal ends other ranks; this rank's signal may follow
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def average_batch_norm_statistics(model: nn.Module) -> None:
    """Replace the running mean and variance of every batch norm by their means over all ranks."""
    running = [b for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    ProcessGroup.current().all_reduce_mean_(running)
