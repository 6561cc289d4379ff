"""The processes that share a job: one, unless torchrun or SLURM started several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those that share the job."""

    rank: int = 0
    """From 0; process 0 alone writes files and talks."""
    size: int = 1
    """How many there are."""

    @classmethod
    def now(cls) -> Processes:
        """Those of the process group, once there is one; else this one alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and talks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The part of this process of `count` things in a row; all parts together are the whole."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    @property
    def own(self) -> slice:
        """Which of a batch's images are this process's: every `size`-th, so that it has its part of any half too."""
        return slice(self.rank, None, self.size)

    @property
    def purpose(self) -> tuple[str | int, ...]:
        """For `seeding.derive`: what makes draws this process's own; process 0's are those of one that is alone."""
        return ("process", self.rank) if self.rank else ()

    def all(self, mine: T) -> list[T]:
        """What every process has, by rank; all of them must call this."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def told(self, mine: T) -> T:
        """What process 0 has; all of them must call this."""
        return self.all(mine)[0]

    def wait(self) -> None:
        """Go on when all have come here."""
        if self.size > 1:
            dist.barrier()


ALONE = Processes()
"""A process that shares nothing."""
