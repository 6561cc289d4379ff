"""Peak memory of training steps, each kind in a process of its own.

Memory that was used stays with a process, so contenders cannot share one. On a CPU the peak is the process's largest
resident set while it steps, less what was resident before the network was built (libraries, and a convolution that
wakes their workers): weights, gradients, moments, activations and scratch space, as torch counts them on a GPU.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from robustfpd.benchmark.scale import Network

if TYPE_CHECKING:
    import torch

STEPS = 3
"""The moments of the optimiser are there from the first on, beside the next one's activations from the second."""
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    peak: int
    """While stepping, above a process without the network."""
    growth: int
    """While stepping, above a process that holds the network: its weights, and the batch."""


def measured(network: Network, contender: str, device: torch.device) -> Memory:
    """Run a contender, `plain`, `detached` or `joint`, in a new process, and return what it told."""
    import torch

    words = [json.dumps(asdict(network)), contender, str(device), str(torch.get_num_threads())]
    command = [sys.executable, "-m", "robustfpd.benchmark.memory", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{network.name}, {contender}: {done.stderr.strip().splitlines()[-1:]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def main(described: str, contender: str, place: str, threads: str) -> Memory:
    """Step, in this process."""
    import torch

    from robustfpd.benchmark import networks

    torch.set_num_threads(int(threads))
    device = torch.device(place)
    wake = torch.nn.Conv2d(8, 8, 3).to(device)
    wake(torch.zeros(2, 8, 16, 16, device=device)).sum().backward()
    before = _now(device)
    trainee = networks.Trainee(Network(**json.loads(described)), "none" if contender == "plain" else "fpd", device)
    built = _now(device)
    _forget_peak(device)
    for _ in range(STEPS):
        trainee.step(networks.JOINT if contender == "joint" else networks.OPEN)
    peak = _peak(device)
    return Memory(peak - before, peak - built)


def _now(device: torch.device) -> int:
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    return _status("VmRSS") or _largest()


def _forget_peak(device: torch.device) -> None:
    """What building needed for a moment is no step's."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    elif FORGET.exists():
        FORGET.write_text("5")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") or _largest()


def _status(field: str) -> int:
    """A size that Linux tells; 0 elsewhere."""
    text = STATUS.read_text() if STATUS.exists() else ""
    found = re.search(rf"^{field}:\s+(\d+) kB", text, flags=re.MULTILINE)
    return int(found.group(1)) * 1024 if found else 0


def _largest() -> int:
    """Largest resident set ever; macOS tells bytes, others kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    print(json.dumps(asdict(main(*sys.argv[1:]))))
