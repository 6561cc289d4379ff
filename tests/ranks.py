"""Runs a function in several ranks of one process group on the CPU."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from robustfpd.distributed import init_process_group

PRELOAD = ["robustfpd.evaluation", "foolbox", "pyautoattack"]
"""Imported once, by the server that all ranks are forked from."""


class Result(NamedTuple):
    """How a rank ended."""

    rank: int
    status: str
    """Name of the exception that ended it, or `done`."""
    value: str
    """What the function returned, or the exception's message."""


class Ranks:
    """Ranks that were started and not yet joined."""

    def __init__(self, function: Callable[[Path], str], folder: Path, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.results: Any = context.Queue()
        arguments = [(function, folder, rank, world_size, port, self.results) for rank in range(world_size)]
        self.processes = [context.Process(target=_run, args=a, daemon=True) for a in arguments]
        for process in self.processes:
            process.start()

    def join(self, seconds: float = 60) -> list[Result]:
        """Return how the ranks ended, by rank."""
        results = sorted(self.results.get(timeout=seconds) for _ in self.processes)
        for process in self.processes:
            process.kill()
            process.join()
        return results


def _run(function: Callable[[Path], str], folder: Path, rank: int, world_size: int, port: int, results: Any) -> None:
    variables = {
        "TORCHELASTIC_RUN_ID": "test", "RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    os.environ.update({name: str(value) for name, value in variables.items()})
    torch.set_num_threads(1)
    try:
        group = init_process_group("cpu")
        assert (group.rank, group.world_size) == (rank, world_size)
        value = function(folder)
        results.put(Result(rank, "done", value))
    except BaseException as error:
        results.put(Result(rank, type(error).__name__, str(error)))
