"""What all settings share: the base class and the names that fields choose from."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict

Norm = Literal["linf", "l2", "l1"]
Denoise = Literal["dot", "bottleneck", "softmax", "gaussian", "none"]
Middle = Literal["input", "restored", "none"]
Head = Literal["tanh", "spectral", "orthogonal", "linear"]
StageName = Literal["two-phase", "adversarial"]
Protocol = Literal["corrected", "published"]

NORMS: tuple[str, ...] = get_args(Norm)
CUSTOM_BACKBONE = "custom"
"""`ModelConfig.backbone` of a network that the user handed over as a module."""


class Config(BaseModel):
    """Base of all settings: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
