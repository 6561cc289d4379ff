"""Peak memory of training steps, each kind in a process of its own, since a process keeps memory that it once used.

On a CPU the peak is the largest resident set during the steps, less the resident set before the network is built
(libraries, and a convolution that starts their threads). It holds weights, gradients, optimizer state, activations and
scratch space, as torch counts them on a GPU.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch

from benchmarks.sizes import NetworkSize
from benchmarks.training_step import Kind, TrainableNetwork

STEPS = 3
"""Adam's state exists from the first step on, and meets the activations of the next from the second on."""
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory during training steps, in bytes."""

    peak: int
    """Above a process without the network."""
    growth: int
    """Above a process that holds the network and the batch."""


def measure(size: NetworkSize, kind: Kind, device: torch.device) -> PeakMemory:
    """Run training steps of a kind in a new process.

    Raises:
        RuntimeError: the process failed.
    """
    arguments = [json.dumps(asdict(size)), kind, str(device), str(torch.get_num_threads())]
    command = [sys.executable, "-m", "benchmarks.peak_memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{size.name}, {kind}: {done.stderr.strip().splitlines()[-1:]}")
    return PeakMemory(**json.loads(done.stdout.splitlines()[-1]))


def main(size: str, kind: str, place: str, threads: str) -> PeakMemory:
    """Measure in this process."""
    torch.set_num_threads(int(threads))
    device = torch.device(place)
    wake = torch.nn.Conv2d(8, 8, 3).to(device)
    wake(torch.zeros(2, 8, 16, 16, device=device)).sum().backward()
    before = _allocated(device)
    network = TrainableNetwork(NetworkSize(**json.loads(size)), cast("Kind", kind), device)
    built = _allocated(device)
    _reset_peak(device)
    for _ in range(STEPS):
        network.step()
    peak = _peak(device)
    return PeakMemory(peak - before, peak - built)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS") or _max_rss()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif RESET.exists():
        RESET.write_text("5")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM") or _max_rss()


def _status(field: str) -> int:
    """Return a size in bytes from Linux's status file; 0 on other systems."""
    text = STATUS.read_text() if STATUS.exists() else ""
    match = re.search(rf"^{field}:\s+(\d+) kB", text, flags=re.MULTILINE)
    return int(match.group(1)) * 1024 if match else 0


def _max_rss() -> int:
    """Return the largest resident set so far; macOS counts bytes, others kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(asdict(main(*sys.argv[1:]))))
