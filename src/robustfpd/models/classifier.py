"""Takes a network's own last linear layer out of it, so that the head can be built around it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class OwnClassifier(NamedTuple):
    """What a network returns once `take_classifier` has taken its last linear layer."""

    channels: int
    """Channels C of the network's output N×C."""
    linear: nn.Linear | None
    """The layer that was taken, where it has one output for each class."""
    logits: bool = False
    """The output is the logits: other layers follow the last linear one, which stays, as in SqueezeNet."""


@torch.no_grad()
def take_classifier(
    net: nn.Module, last_stage: nn.Module, run: Callable[[], Tensor], num_classes: int
) -> OwnClassifier:
    """Replace the last linear layer of a network by the identity if its output is the network's; return the layer.

    Where other layers follow it, as in SqueezeNet, the network keeps it, and its outputs are logits or features.

    Args:
        net: a network in evaluation mode, which is changed.
        last_stage: the module where its last stage ends: layers before its end are no classifier.
        run: runs the network on one image and returns its output.
        num_classes: number of classes K.
    """
    ran: list[nn.Module] = []
    layers = [m for m in net.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [m.register_forward_pre_hook(lambda module, args: ran.append(module)) for m in layers]
    hooks.append(last_stage.register_forward_hook(lambda *_: ran.clear()))
    try:
        output = run()
    finally:
        for hook in hooks:
            hook.remove()
    channels = output.shape[1]
    if output.ndim != 2 or not ran:
        return OwnClassifier(channels, None)
    layer = ran[-1]
    if _returns_output_of(layer, run):
        name, linear = next(n for n, m in net.named_modules() if m is layer), _as_linear(layer)
        net.set_submodule(name, nn.Identity())
        with suppress(Exception):  # the user's code may not take the layer's input, or may read the layer's weight
            features, slack = run(), 1e-5 * float(output.abs().max())
            if features.ndim == 2 and torch.allclose(linear(features), output, rtol=0, atol=slack):
                return OwnClassifier(linear.in_features, linear if channels == num_classes else None)
        net.set_submodule(name, layer)
    return OwnClassifier(channels, None, logits=channels == num_classes)


def _returns_output_of(layer: nn.Module, run: Callable[[], Tensor]) -> bool:
    """Return whether `run` returns the layer's output unchanged, large and negative too: a ReLU keeps some outputs."""
    probes: list[Tensor] = []

    def probe(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        probes.append(torch.linspace(-100, 100, out.numel()).reshape(out.shape))
        return probes[-1]

    hook = layer.register_forward_hook(probe)
    try:
        output = run()
    finally:
        hook.remove()
    return torch.equal(output.flatten(), probes[-1].flatten())


def _as_linear(layer: nn.Module) -> nn.Linear:
    """Return a linear layer, or a convolution of 1×1 maps as one with the same weights."""
    if isinstance(layer, nn.Linear):
        return layer
    assert isinstance(layer, nn.Conv2d)
    weight = layer.weight.flatten(1)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
    linear.weight.copy_(weight)
    if layer.bias is not None:
        linear.bias.copy_(layer.bias)
    return linear
