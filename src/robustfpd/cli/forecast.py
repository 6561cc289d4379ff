"""What `--dry-run` tells of a cost: passes, and the time that they would take here."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from robustfpd.attacks.cost import Passes
    from robustfpd.config import TaskConfig

BATCH = 16
"""Images that are timed at once."""
SECONDS = 1.0
"""How long passes are timed, each way, once they are warm."""


@dataclass(frozen=True)
class Pace:
    """Seconds that an image takes."""

    forward: float
    backward: float
    """Beside those of its way forward."""

    def seconds(self, passes: Passes) -> float:
        """Seconds that passes take."""
        return passes.forward * self.forward + passes.backward * self.backward

    def __str__(self) -> str:
        return f"{1000 * self.forward:.3g} ms forward and {1000 * self.backward:.3g} ms backward an image"


def pace(network: nn.Module, task: TaskConfig, device: torch.device, *, training: bool, bf16: bool = False) -> Pace:
    """Time a few passes of random images through a network, as training or as attacks ask for them."""
    import torch

    from robustfpd.attacks.base import preserve_state
    from robustfpd.models import FPDOutput

    network.to(device).train(training)
    images = torch.rand(BATCH, task.in_channels, *task.image_size, device=device)

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out: Any = network(images)
        return out.logits.sum() + out.restored.sum() if isinstance(out, FPDOutput) else out.sum()

    def both() -> None:
        images.requires_grad_(not training)
        forward().backward()  # type: ignore[no-untyped-call]

    scene: AbstractContextManager[None] = nullcontext() if training else preserve_state(network)
    with scene:
        whole = _timed(both, device)
        images.requires_grad_(False)
        with torch.no_grad():
            there = _timed(forward, device)
    return Pace(there / BATCH, max(whole - there, 0.0) / BATCH)


def _timed(action: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, the least of several: what else runs here only adds."""
    import torch

    def once() -> float:
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    found, begun = [once()], time.perf_counter()
    while time.perf_counter() - begun < SECONDS and len(found) < 20:
        found.append(once())
    return min(found)
