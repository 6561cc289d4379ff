"""FPDs that the tests of several folders share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robustfpd.config import ModelConfig, TrainingConfig, parse, protocol_defaults
from robustfpd.models import FPD
from robustfpd.models.heads import ClassificationLayer

GATED: dict[str, Any] = {"denoise": "normalised", "middle": "input", "front_stages": 2}
"""Gated denoising within and between the passes and two front stages, none of them a default of `improved`."""


def gated(**options: Any) -> dict[str, Any]:
    """Return options of `enhance`, with those of `GATED` that are not given where the protocol is `improved`."""
    return {**(GATED if options.get("protocol", "improved") == "improved" else {}), **options}


def as_trained(model: FPD, gate: float = 0.3) -> FPD:
    """Set gates and a residual restoration to values other than 0, as training does; the paper's FPD has neither.

    The images change as much with any `restoration_scale`.
    """
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("gate", "middle_gate"):
                parameter.fill_(gate)
        if model.config.restoration == "residual":
            last = model.decoder.upscale[-1]
            assert isinstance(last, nn.ConvTranspose2d)
            for parameter in last.parameters():
                parameter.copy_(0.3 / model.config.restoration_scale * torch.randn(parameter.shape, generator=draws))
    return model


def corrected(**options: Any) -> ModelConfig:
    """Return settings of the paper's network."""
    return parse(ModelConfig, {**protocol_defaults("corrected", "model"), **options})


def corrected_training(**options: Any) -> TrainingConfig:
    """Return settings of the paper's training: no noise between the passes, losses in pixels, an absolute threshold."""
    return parse(TrainingConfig, {**protocol_defaults("corrected", "training"), **options})


def effective_weight(head: ClassificationLayer) -> Tensor:
    """The matrix of the affine map, read off its values."""
    weight = head.linear.weight
    assert isinstance(weight, Tensor)
    channels = weight.shape[1]
    with torch.no_grad():
        return (head.pre_squash(torch.eye(channels)) - head.pre_squash(torch.zeros(1, channels))).T
