"""The machine that a benchmark runs on: what it is, and how to wait for it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from robustfpd.models.precision import multiplies_bf16
from robustfpd.provenance import environment


def described(device: torch.device) -> dict[str, Any]:
    """Versions, revision, processor, cores, and whether bfloat16 is quick here."""
    cuda = device.type == "cuda"
    return {
        **environment(device),
        "processor": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "bfloat16": multiplies_bf16(device),
    }


def synchroniser(device: torch.device) -> Callable[[], None]:
    """What waits until the device is done; a CPU always is."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return (lambda: torch.mps.synchronize()) if device.type == "mps" else (lambda: None)


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    """A field of the first processor in Linux's list; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field), "")
