"""Straight-through gradients past submodules that stop them: BPDA with the identity.

Athalye et al., "Obfuscated Gradients Give a False Sense of Security", ICML 2018, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


class BPDA(nn.Module):
    """Wrap a classifier: equal outputs, but gradients pass `submodules` as if these were the identity."""

    def __init__(self, classifier: nn.Module, submodules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.classifier = classifier
        self.submodules = tuple(submodules)  # a tuple, so that the classifier's own modules are not registered twice

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits N×K of images N×C×H×W."""
        inputs: list[Tensor] = []

        def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
            inputs.append(arguments[0])
            return (arguments[0].clone(), *arguments[1:])  # an in-place module would overwrite it

        def after(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            return straight_through(inputs.pop(), output)

        with _hooks(self.submodules, before, after):
            logits: Tensor = self.classifier(images)
        return logits


def non_differentiable_modules(classifier: nn.Module, images: Tensor) -> list[nn.Module]:
    """Return the outermost submodules that map a tensor to one of the same shape and pass no gradient.

    These are modules that round, binarise, compress or detach. The classifier is called once, on a few images N×C×H×W.
    """
    inputs: dict[nn.Module, Tensor] = {}
    candidates: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if len(arguments) == 1 and isinstance(arguments[0], Tensor) and arguments[0].is_floating_point():
            inputs.setdefault(module, arguments[0].detach().clone())  # an in-place module would overwrite it

    def after(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if module in inputs and isinstance(output, Tensor) and inputs[module].shape == output.shape:
            candidates[module] = inputs[module]

    submodules = [m for m in classifier.modules() if m is not classifier and not isinstance(m, torch.jit.ScriptModule)]
    with _hooks(submodules, before, after), torch.no_grad():
        classifier(images)
    blocking = [m for m, x in candidates.items() if _blocks_gradient(m, x)]
    inner = {id(part) for m in blocking for part in m.modules() if part is not m}
    return [m for m in blocking if id(m) not in inner]


def straight_through(x: Tensor, output: Tensor) -> Tensor:
    """Return `output`, with its gradient passed to `x` unchanged; both have one shape."""
    result: Tensor = _StraightThrough.apply(x, output.detach())
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor) -> Tensor:
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _hooks(modules: Sequence[nn.Module], before: Callable[..., Any], after: Callable[..., Any]) -> ExitStack:
    """Register forward hooks; the returned context removes them on exit."""
    handles = ExitStack()
    for m in modules:
        handles.enter_context(m.register_forward_pre_hook(before))
        handles.enter_context(m.register_forward_hook(after))
    return handles


def _blocks_gradient(module: nn.Module, x: Tensor) -> bool:
    """Return whether a module's output varies with its input but has no gradient."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        try:
            output = module(x * 1)  # a leaf cannot be changed in place
        except Exception:
            return False  # it works inside the classifier only, so its gradient cannot be checked
        if bool(output.detach().eq(output.detach().flatten()[0]).all()):
            return False  # constant
        if not output.requires_grad:
            return True
        # Unequal weights: the plain sum of a softmax or a normalisation does not vary.
        weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype, device=output.device)
        (gradient,) = torch.autograd.grad((output * weights.reshape(output.shape)).sum(), x, allow_unused=True)
    return gradient is None or not bool(gradient.ne(0).any())
