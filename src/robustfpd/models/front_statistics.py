"""Running averages of the front pass, beside those of the backbone's own batch norms."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustfpd.config import TaskConfig
from robustfpd.device import evaluating
from robustfpd.models.insertion import StagedBackbone


class FrontStatistics(nn.Module):
    """Running averages of the front pass, for the batch norms of a backbone that it runs.

    The two passes run on different images, so averages over both represent neither.

    Args:
        backbone: provides the initial averages.
        task: number of channels and size of the images.
    """

    def __init__(self, backbone: StagedBackbone, task: TaskConfig) -> None:
        super().__init__()
        ran: set[nn.Module] = set()
        hooks = [m.register_forward_pre_hook(lambda m, _: ran.add(m)) for m in backbone.modules()]
        with torch.no_grad(), evaluating(backbone):
            backbone(torch.zeros(1, task.in_channels, *task.image_size))
        for hook in hooks:
            hook.remove()
        norms = {name: m for name, m in backbone.named_modules() if m in ran and isinstance(m, _BatchNorm)}
        self._names = [f"{name}.{buffer}" for name, norm in norms.items() for buffer, _ in norm.named_buffers()]
        for name in self._names:
            self.register_buffer(_flat(name), backbone.get_buffer(name).clone())

    def by_name(self) -> dict[str, Tensor]:
        """Return the averages by their names in the backbone."""
        return {name: self.get_buffer(_flat(name)) for name in self._names}


def _flat(name: str) -> str:
    return name.replace(".", "-")  # a buffer's name cannot hold a dot
