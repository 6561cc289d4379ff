"""Classifiers in half precision (float16, bfloat16), for attacks and checks that calculate in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


class SinglePrecision(nn.Module):
    """Wrap a classifier of images in half precision as one of float32 images, with float32 logits and gradients.

    Images are rounded to the classifier's precision on their way in, so the result for a float32 image is that for the
    image in half precision. Distances, projections, losses and steps of attacks are float32: in half precision, small
    radii and steps round to zero.

    The gradient of each image's logits is scaled to a largest entry of 1 on its way through the classifier, and scaled
    back: the gradient of cross-entropy underflows in float16 where a prediction is confident.

    Args:
        classifier: images N×C×H×W of `dtype` → logits N×K.
        dtype: float16 or bfloat16.
        scaled: scale gradients; not where a loss reads more from the classifier than its logits.
    """

    def __init__(self, classifier: nn.Module, dtype: torch.dtype, *, scaled: bool = True) -> None:
        super().__init__()
        self.classifier, self.dtype, self.scaled = classifier, dtype, scaled
        self.training = classifier.training

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits N×K of images N×C×H×W, both in float32."""
        scale: list[Tensor] = []
        if self.scaled and images.requires_grad and torch.is_grad_enabled():
            images = _Round.apply(images, self.dtype, scale)
        logits: Tensor = self.classifier(images.to(self.dtype))
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.dtype not in HALF:
            return logits  # no logits in half precision: reported where outputs are checked
        if self.scaled and logits.requires_grad:
            logits = _Scale.apply(logits, scale)
        return logits.float()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the classifier's own state, under its own names."""
        return self.classifier.state_dict(*args, **kwargs)


class _Round(torch.autograd.Function):
    """Round images; backwards, divide the gradient by the scale of `_Scale`."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, dtype: torch.dtype, scale: list[Tensor]) -> Tensor:
        ctx.scale, ctx.dtype = scale, images.dtype
        return images.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].to(ctx.dtype)
        return (gradient * ctx.scale[-1].reshape(-1, 1, 1, 1) if ctx.scale else gradient), None, None


class _Scale(torch.autograd.Function):
    """The identity; backwards, scale each row to a largest entry of 1."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, scale: list[Tensor]) -> Tensor:
        ctx.scale, ctx.dtype = scale, logits.dtype
        return logits.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        largest = gradients[0].abs().amax(dim=1, keepdim=True)
        largest = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
        ctx.scale[:] = [largest]
        return (gradients[0] / largest).to(ctx.dtype), None
