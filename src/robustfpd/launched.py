"""How this process was started: alone, or as one of several by torchrun or by SLURM's srun. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from robustfpd.errors import InputError

Starter = Literal["shell", "torchrun", "srun"]


@dataclass(frozen=True)
class Launched:
    """What the starter says of this process; `processes.Processes` says it once they have met."""

    by: Starter = "shell"
    rank: int = 0
    """From 0, over all nodes; process 0 alone writes files and talks."""
    size: int = 1
    """How many there are on all nodes."""
    local_rank: int = 0
    """From 0, on this node: the number of its GPU."""
    local_size: int = 1
    """How many there are on each node."""

    @classmethod
    def now(cls, variables: Mapping[str, str] = os.environ) -> Launched:
        """Read the starter's variables.

        Raises:
            InputError: the nodes have unlike numbers of processes.
        """
        if "TORCHELASTIC_RUN_ID" in variables:  # torchrun inside srun counts as torchrun
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            return cls("torchrun", *(int(variables[name]) for name in names)).checked()
        # In a batch script SLURM_NTASKS tells what srun would start; only what srun started has a step.
        size = int(variables.get("SLURM_STEP_NUM_TASKS", "1"))
        if size == 1:
            return cls()
        nodes = int(variables.get("SLURM_STEP_NUM_NODES", "1"))
        ranks = (int(variables["SLURM_PROCID"]), size, int(variables["SLURM_LOCALID"]))
        return cls("srun", *ranks, size // nodes if size % nodes == 0 else 0).checked()

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and talks."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return self.size // self.local_size

    def checked(self) -> Launched:
        """Itself, if every node has as many processes."""
        if self.local_size < 1 or self.size % self.local_size:
            raise InputError(
                f"{self.by} started {self.size} processes, not as many on each node; give each node the same number "
                "(torchrun --nproc-per-node, srun --ntasks-per-node)"
            )
        return self
