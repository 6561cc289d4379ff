"""Backbones, the Feature Pyramid Decoder, its head, and models on disk.

Names are imported on first use, so that `zoo` and `checkpoint` work without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustfpd.models.author_checkpoints import load_published
    from robustfpd.models.factory import build, enhance, load
    from robustfpd.models.fpd import FPD, Baseline, FPDClassifier, FPDOutput

__all__ = ["FPD", "Baseline", "FPDClassifier", "FPDOutput", "build", "enhance", "load", "load_published"]

_MODULES = {
    "build": "factory", "enhance": "factory", "load": "factory", "FPD": "fpd", "FPDClassifier": "fpd",
    "FPDOutput": "fpd", "Baseline": "fpd", "load_published": "author_checkpoints",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        if not name.startswith("_") and find_spec(f"robustfpd.models.{name}") is not None:
            return import_module(f"robustfpd.models.{name}")
        raise AttributeError(f"module 'robustfpd.models' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"robustfpd.models.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
