"""The machine that a benchmark runs on: what it is, whether it has bfloat16, and how to wait for it."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from robustfpd.provenance import environment

BF16_FLAGS = {"avx512_bf16", "amx_bf16"}
"""What Linux calls the instructions that make bfloat16 worth while on a CPU."""


def described(device: torch.device) -> dict[str, Any]:
    """Versions, revision, processor, cores, and whether bfloat16 is quick here."""
    cuda = device.type == "cuda"
    return {
        **environment(device),
        "processor": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cores": os.cpu_count(),
        "bfloat16": has_bfloat16(device),
    }


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 with instructions of its own."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(BF16_FLAGS & set(_cpuinfo("flags").split()))


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
