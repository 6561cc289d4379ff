"""Straight-through gradients (BPDA with the identity) past submodules that stop them.

Athalye et al., "Obfuscated Gradients Give a False Sense of Security", ICML 2018, section 4.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class BPDA(nn.Module):
    """A classifier whose gradients pass some of its submodules as if these were the identity; forward is the same."""

    def __init__(self, classifier: nn.Module, submodules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.classifier = classifier
        self.submodules = tuple(submodules)  # a tuple: they are the classifier's own and must not be listed twice

    def forward(self, images: Tensor) -> Tensor:
        """Classify images N×C×H×W: logits N×K."""
        given: list[Tensor] = []

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
            given.append(arguments[0])
            return (arguments[0].clone(), *arguments[1:])  # a module in place would overwrite it

        def after(module: nn.Module, arguments: tuple[Any, ...], out: Tensor) -> Tensor:
            return straight_through(given.pop(), out)

        hooks: list[Any] = [m.register_forward_pre_hook(before) for m in self.submodules]
        hooks += [m.register_forward_hook(after) for m in self.submodules]
        try:
            logits: Tensor = self.classifier(images)
        finally:
            for hook in hooks:
                hook.remove()
        return logits


def non_differentiable_modules(classifier: nn.Module, images: Tensor) -> list[nn.Module]:
    """Return the outermost submodules that map a tensor to one of the same shape and pass no gradient.

    Rounding, binarising, compressing and detaching modules are such; ones in training mode are asked as they are.
    """
    given: dict[nn.Module, Tensor] = {}
    seen: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if len(arguments) == 1 and isinstance(arguments[0], Tensor) and arguments[0].is_floating_point():
            given.setdefault(module, arguments[0].detach().clone())  # a module in place would overwrite it

    def after(module: nn.Module, arguments: tuple[Any, ...], out: Any) -> None:
        if module in given and isinstance(out, Tensor) and given[module].shape == out.shape:
            seen[module] = given[module]

    inner = [m for m in classifier.modules() if m is not classifier and not isinstance(m, torch.jit.ScriptModule)]
    hooks: list[Any] = [m.register_forward_pre_hook(before) for m in inner]
    hooks += [m.register_forward_hook(after) for m in inner]
    try:
        with torch.no_grad():
            classifier(images)
    finally:
        for hook in hooks:
            hook.remove()
    dead = [m for m, x in seen.items() if _stops(m, x)]
    covered = {id(part) for m in dead for part in m.modules() if part is not m}
    return [m for m in dead if id(m) not in covered]


def _stops(module: nn.Module, x: Tensor) -> bool:
    """Whether no gradient comes back through a module although its output varies."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        try:
            out = module(x * 1)  # a leaf cannot be changed in place
        except Exception:
            return False  # it works only inside the whole: whether it passes gradients cannot be told
        if not bool(out.detach().ne(out.detach().flatten()[0]).any()):
            return False  # a constant has no gradient to hide
        if not out.requires_grad:
            return True
        # Not the sum: what a softmax or a normalisation sums to does not vary.
        weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device).reshape(out.shape)
        (gradient,) = torch.autograd.grad((out * weights).sum(), x, allow_unused=True)
    return gradient is None or not bool(gradient.ne(0).any())


class _Identity(torch.autograd.Function):
    """Gives `out`, with the gradient of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(x: Tensor, out: Tensor) -> Tensor:
    """Return `out`, whose gradient goes to `x` as it is; both have one shape."""
    passed: Tensor = _Identity.apply(x, out.detach())
    return passed
