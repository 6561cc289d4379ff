"""Which arithmetic a device is quick in."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from robustfpd.config import Precision
from robustfpd.errors import unknown_name

HALVES_FROM = (8, 0)
"""Compute capability of the first GPUs that multiply bfloat16 (Ampere)."""


def chosen(precision: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """Return what `auto` means on a device: bfloat16 autocast where the hardware multiplies it, else float32.

    Raises:
        InputError: `precision` is unknown.
    """
    if precision not in get_args(Precision):
        raise unknown_name("precision", precision, get_args(Precision))
    if precision != "auto":
        return precision
    return "bf16" if multiplies_bf16(device) else "fp32"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16: AMX or AVX512-BF16 on CPUs, tensor cores on GPUs."""
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= HALVES_FROM
