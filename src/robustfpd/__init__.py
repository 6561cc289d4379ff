"""robustfpd: evaluate the robustness of image classifiers, and defend them with a Feature Pyramid Decoder.

    import robustfpd as rf

    model = rf.enhance("resnet18", num_classes=10, in_channels=1, image_size=28)
    out = model(images)                    # FPDOutput(logits, restored)
    record = rf.evaluate(model.classifier(), (images, labels), eps=0.1)

Names are imported when they are first used, so that `import robustfpd` and `robustfpd --help` need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robustfpd import attacks, data
    from robustfpd.config import ModelConfig, RunConfig, TaskConfig, recipe
    from robustfpd.errors import InputError
    from robustfpd.evaluation import EvaluationRecord, evaluate
    from robustfpd.models import FPD, Baseline, FPDOutput, build, enhance, load, load_published
    from robustfpd.training import train

__version__ = "0.1.0"

_MODULES = {
    "FPD": "models", "FPDOutput": "models", "Baseline": "models", "build": "models", "enhance": "models",
    "load": "models", "load_published": "models",
    "EvaluationRecord": "evaluation", "evaluate": "evaluation", "train": "training", "InputError": "errors",
    "ModelConfig": "config", "RunConfig": "config", "TaskConfig": "config", "recipe": "config",
}  # fmt: skip
"""Module of each public name."""

__all__ = [
    "FPD", "Baseline", "EvaluationRecord", "FPDOutput", "InputError", "ModelConfig", "RunConfig", "TaskConfig",
    "attacks", "build", "data", "enhance", "evaluate", "load", "load_published", "recipe", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'robustfpd' has no attribute {name!r}")
    value = import_module(f"robustfpd.{_MODULES.get(name, name)}")
    if name in _MODULES:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
