"""Counts what an attack asks of a classifier: images forward, images backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class QueryCounter(nn.Module):
    """A classifier that counts the images which pass through it; costs are told in passes, not in seconds."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        self.forward_passes = 0
        """Images that went forward."""
        self.backward_passes = 0
        """Images whose gradient was asked for."""
        self.per_image: Tensor | None = None
        """Forward passes of each image of the last attack, N, where it told them; see `record_queries`."""
        self.low_precision = False
        """Pass images in bfloat16 (autocast); logits are float32 all the same."""

    def forward(self, images: Tensor) -> Tensor:
        """Classify images N×C×H×W: logits N×K."""
        self.forward_passes += len(images)
        if self.low_precision:
            with torch.autocast(images.device.type, torch.bfloat16):
                answers = self.classifier(images)
            logits: Tensor = answers.float() if isinstance(answers, Tensor) else answers
        else:
            logits = self.classifier(images)
        if isinstance(logits, Tensor) and logits.requires_grad:
            logits.register_hook(self._went_back)  # type: ignore[no-untyped-call]
        return logits

    def _went_back(self, gradient: Tensor) -> None:
        self.backward_passes += len(gradient)

    def reset(self) -> None:
        """Start again at zero."""
        self.forward_passes, self.backward_passes, self.per_image = 0, 0, None


def record_queries(classifier: nn.Module, queries: Tensor | None) -> None:
    """For attacks that know how often each image was tried: queries N, kept by a classifier that counts.

    None takes back what a part of an attack told of a part of the images.
    """
    if isinstance(classifier, QueryCounter):
        classifier.per_image = None if queries is None else queries.detach().to("cpu", torch.long)
