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
Precision = Literal["auto", "fp32", "bf16"]

NORMS: tuple[str, ...] = get_args(Norm)
STAGES: tuple[str, ...] = get_args(StageName)
PRECISIONS: tuple[str, ...] = get_args(Precision)
DATASETS = ("caltech101", "caltech256", "cifar10", "digits", "fashion_mnist", "folder", "mnist", "svhn")
"""Names of the data sets, as `robustfpd.data` has them: known here so that asking for one takes no torch."""
SUITES = ("first-look", "full", "pgd-100", "published", "published-mnist", "quick", "standard")
"""Names of the suites of attacks, as `robustfpd.evaluation` has them."""
DEVICES = ("auto", "cpu", "cuda", "mps")
"""Kinds of devices; `cuda:1` is one of several."""
CUSTOM_BACKBONE = "custom"
"""`ModelConfig.backbone` of a network that the user handed over as a module."""


class Config(BaseModel):
    """Base of all settings: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
