"""Several processes (ranks) at one job: launch environment, collectives, shared errors.

The module imports torch only where it is used, so that the command line starts without it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
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

Launcher = Literal["none", "torchrun", "srun"]
T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others in one collective."""


@dataclass(frozen=True)
class LaunchEnvironment:
    """The ranks that torchrun or srun started, as the environment variables of this process state them."""

    launcher: Launcher = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Rank on this node; the index of its GPU."""
    local_world_size: int = 1
    """Ranks on each node."""

    def __post_init__(self) -> None:
        if self.local_world_size < 1 or self.world_size % self.local_world_size:
            raise InputError(
                f"{self.launcher} started {self.world_size} processes, not as many on each node; give each node the "
                "same number (torchrun --nproc-per-node, srun --ntasks-per-node)"
            )

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> LaunchEnvironment:
        """Read the launcher's variables.

        Raises:
            InputError: the nodes have different numbers of ranks.
        """
        if "TORCHELASTIC_RUN_ID" in variables:  # torchrun inside srun counts as torchrun
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            return cls("torchrun", *(int(variables[name]) for name in names))
        # A batch script itself has SLURM_NTASKS; only processes that srun started have a step.
        world_size = int(variables.get("SLURM_STEP_NUM_TASKS", "1"))
        if world_size == 1:
            return cls()
        nodes = int(variables.get("SLURM_STEP_NUM_NODES", "1"))
        local_world_size = 0 if world_size % nodes else world_size // nodes
        rank, local_rank = int(variables["SLURM_PROCID"]), int(variables["SLURM_LOCALID"])
        return cls("srun", rank, world_size, local_rank, local_world_size)

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.world_size // self.local_world_size


@dataclass(frozen=True)
class ProcessGroup:
    """The ranks that share a job, and their collectives, which every rank must call in the same order.

    Without an initialised process group there is one rank, and collectives return their argument.
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
        """Return this rank's contiguous part of `count` items; the parts differ in size by at most one."""
        size, remainder = divmod(count, self.world_size)
        start = self.rank * size + min(self.rank, remainder)
        return slice(start, start + size + (self.rank < remainder))

    @property
    def batch_shard(self) -> slice:
        """Slice of a batch for one rank: every `world_size`-th, so that each half of a batch is shared as well."""
        return slice(self.rank, None, self.world_size)

    @property
    def seed_purpose(self) -> tuple[str | int, ...]:
        """Words for `rng.derive` that give each rank its own draws; rank 0 draws as a single process does."""
        return ("process", self.rank) if self.rank else ()

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank, on every rank. Values are pickled."""
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
        """Call `function` on rank 0 alone and return its value on every rank; its error is shared."""
        with shared_errors():
            value = function() if self.is_main else None
        return self.broadcast(value)  # type: ignore[return-value]

    def all_reduce_mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of `tensor` over all ranks, detached, with equal bits on every rank."""
        if self.world_size == 1:
            return tensor.detach()
        import torch.distributed as dist

        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.world_size

    def all_reduce_mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all ranks, in one message."""
        if self.world_size == 1 or not tensors:
            return
        import torch

        with torch.no_grad():
            mean = self.all_reduce_mean(torch.cat([tensor.reshape(-1) for tensor in tensors]))
            for tensor, part in zip(tensors, torch.split(mean, [tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier()

    def check_equal(self, values: Mapping[str, Any]) -> None:
        """Compare values across ranks.

        Raises:
            InputError: a rank has another value than rank 0; the message lists the names.
        """
        with shared_errors():
            ranks = self.gather(dict(values))
            different = [name for name in values if any(other[name] != ranks[0][name] for other in ranks)]
            if different:
                raise InputError(
                    f"the ranks were given different {', '.join(different)}; start all of them with the same arguments "
                    "(several seeds are several commands)"
                )


SINGLE_PROCESS = ProcessGroup()
"""One rank, which shares nothing."""


def init_process_group(device: str = "auto", timeout: timedelta = TIMEOUT) -> ProcessGroup:
    """Initialise torch's process group once, if torchrun or srun started several processes.

    Args:
        device: `auto`, `cpu` or `cuda`; with `cuda` each rank takes the GPU of its local rank.
        timeout: how long a rank waits for the others, here and in later collectives.

    Raises:
        InputError: fewer GPUs than ranks on this node, a device that several ranks cannot use, or ranks that do not
            answer; on ranks with a local rank above 0 as `ReportedByOtherRank`.
    """
    environment = LaunchEnvironment.read()
    if environment.world_size == 1:
        return ProcessGroup.current()
    import torch.distributed as dist

    if dist.is_initialized():
        return ProcessGroup.current()
    try:
        backend = _backend(environment, device)
        _export_variables(environment)
        dist.init_process_group(backend, rank=environment.rank, world_size=environment.world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        message = str(error)
        if not isinstance(error, InputError):
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            ranks = f"rank {environment.rank} of {environment.world_size}"
            message = f"{ranks} could not connect to the others at {address}: {first_line(error)}"
        raise (ReportedByOtherRank if environment.local_rank else InputError)(message) from None
    return ProcessGroup.current()


def _backend(environment: LaunchEnvironment, device: str) -> str:
    """Return the backend for a device, and take this rank's GPU."""
    import torch

    kind = device_name(device, environment.world_size)
    if kind == "cpu":
        return "gloo"
    if torch.cuda.device_count() < environment.local_world_size:
        raise InputError(
            f"{environment.local_world_size} processes on this node see {torch.cuda.device_count()} GPUs, and need one "
            f"each; start fewer with {'--nproc' if environment.launcher == 'torchrun' else '--ntasks'}-per-node, let "
            "each see all (SLURM: --gpus-per-node, not --gpus-per-task), or use --device cpu"
        )
    torch.cuda.set_device(environment.local_rank)
    return "cpu:gloo,cuda:nccl"


def _export_variables(environment: LaunchEnvironment) -> None:
    """Set the variables that torchrun sets, which torch and Fabric read, under srun as well."""
    if environment.launcher == "torchrun":
        return
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
    os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    # Jobs that share a node, and steps of one job, need ports of their own.
    number = 7 * int(os.environ.get("SLURM_JOB_ID", "0")) + int(os.environ.get("SLURM_STEP_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(15000 + number % 10000))
    for name, value in (
        ("RANK", environment.rank), ("WORLD_SIZE", environment.world_size), ("LOCAL_RANK", environment.local_rank),
        ("LOCAL_WORLD_SIZE", environment.local_world_size),
        ("GROUP_RANK", environment.rank // environment.local_world_size),
    ):  # fmt: skip
        os.environ[name] = str(value)


@contextmanager
def shared_errors() -> Iterator[None]:
    """Raise an error of any rank on all ranks at the end of the block, which every rank must enter.

    The lowest rank that failed raises its own error, the others raise `ReportedByOtherRank`. The block must not hold a
    collective that only some ranks reach: a rank that failed does not answer. Blocks may be nested.
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
    origin = error is not None and not isinstance(error, ReportedByOtherRank)
    messages = group.gather(f"{type(error).__name__}: {first_line(error)}" if error is not None and origin else None)
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if error is not None and (not failed or failed[0] == group.rank):
        raise error
    if failed:
        raise ReportedByOtherRank(f"rank {failed[0]} failed: {messages[failed[0]]}") from None


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, by which torchrun and SLURM end processes, as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except RuntimeError:
        if LaunchEnvironment.read().world_size > 1:
            time.sleep(1)  # a collective fails when other ranks end by a signal; this rank's own may be on its way
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def average_batch_norm_statistics(model: nn.Module) -> None:
    """Replace the running mean and variance of every batch norm by their means over all ranks."""
    from torch.nn.modules.batchnorm import _BatchNorm

    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    running = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
    ProcessGroup.current().all_reduce_mean_([statistic for statistic in running if statistic is not None])
