"""ELU (Clevert et al., ICLR 2016), fast on CPUs, and the replacement of other activations by it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.activations import GELU, GELUTanh, HardMish, HardSwish, Mish, QuickGELU, Swish
from timm.layers.activations_me import HardMishMe, HardSwishMe, MishMe, SwishMe
from torch import Tensor, nn

from robustfpd.models.ops import traced

_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.CELU, nn.SELU,
    Swish, Mish, HardSwish, HardMish, SwishMe, MishMe, HardSwishMe, HardMishMe, GELU, GELUTanh, QuickGELU,
)  # fmt: skip
"""Activations between layers. Sigmoids are gates and stay."""
_AT_ONCE = {torch.float32: 1 << 18, torch.float64: 1 << 17}
"""Numbers processed at a time: as many as fit into a core's cache with the intermediate results."""
UNDERFLOW = -40
"""At and below, exp(x) - 1 is -1, in float64 too. Further down exp gives subnormal numbers, ten times as slow."""


def _elu_(x: Tensor) -> Tensor:
    """Overwrite a dense tensor by max(x, exp(min(x, 0)) - 1), in pieces, so that it is read from memory once."""
    flat = torch.as_strided(x, (x.numel(),), (1,), x.storage_offset())
    half = x.dtype not in _AT_ONCE
    for piece in torch.split(flat, _AT_ONCE.get(x.dtype, 1 << 16)):
        wide = piece.float() if half else piece  # exp(x) - 1 near zero is lost in half precision
        below = wide.clamp(UNDERFLOW, 0).exp_().sub_(1)
        torch.maximum(wide, below, out=below if half else piece)
        if half:
            piece.copy_(below)
    return x


class _CpuElu(torch.autograd.Function):
    """x for x > 0, else exp(x) - 1, in place on request.

    torch's CPU kernel uses expm1, which takes two to three times as long as exp; they differ by rounding near zero,
    below 1e-7.
    """

    @staticmethod
    def forward(x: Tensor, inplace: bool) -> Tensor:
        return _elu_(x if inplace else x.clone())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        if inputs[1]:
            ctx.mark_dirty(inputs[0])
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.elu_backward(gradients[0], 1.0, 1.0, 1.0, True, y), None


class ELU(nn.ELU):
    """`torch.nn.ELU` with alpha 1, about twice as fast on CPUs."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__(alpha=1.0, inplace=inplace)

    def forward(self, input: Tensor) -> Tensor:
        """Map any shape to the same shape."""
        if not _dense_on_cpu(input):
            return F.elu(input, inplace=self.inplace)
        if torch.is_grad_enabled() and input.requires_grad:
            out: Tensor = _CpuElu.apply(input, self.inplace)
            return out
        return _elu_(input if self.inplace else input.clone())


def _dense_on_cpu(x: Tensor) -> bool:
    """Return whether the elements of `x` fill one block of memory of the CPU, and it is not traced."""
    if x.device.type != "cpu" or not x.is_floating_point() or traced(x):
        return False
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def swap_activations(net: nn.Module) -> int:
    """Replace activation modules between layers by ELU and return their number. Functional calls stay."""
    swapped = 0
    for name, child in list(net._modules.items()):  # named_children() names a shared activation only once
        if child is None:
            continue
        if isinstance(child, _ACTIVATIONS):
            setattr(net, name, ELU(inplace=bool(getattr(child, "inplace", False))))
            swapped += 1
        else:
            swapped += swap_activations(child)
    return swapped


def keep_inputs(net: nn.Module) -> bool:
    """Make in-place activations keep their inputs; return whether there were any."""
    in_place = [m for m in net.modules() if isinstance(m, (nn.ELU, *_ACTIVATIONS)) and getattr(m, "inplace", False)]
    for m in in_place:
        m.inplace = False
    return bool(in_place)


def to_elu(net: nn.Module) -> None:
    """Replace activation modules by ELU; warn when there are none."""
    if swap_activations(net) == 0 and not any(isinstance(m, nn.ELU) for m in net.modules()):
        warnings.warn(
            f"{type(net).__name__} has no activation modules to replace by ELU (it may call them as functions); "
            "they are kept. Pass activation='keep' if this is intended.",
            stacklevel=2,
        )
