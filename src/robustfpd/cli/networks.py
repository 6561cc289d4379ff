"""A network of ours that a command uses: of a run, one that comes with robustfpd, or a saved one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robustfpd.config import DataConfig
    from robustfpd.models import FPD, Baseline


@dataclass(frozen=True)
class Network:
    """A loaded network, and what is known of its images."""

    name: str
    model: FPD | Baseline
    data: DataConfig | None
    """Of the run; None for a saved model."""
    class_names: tuple[str, ...]
    """Empty where nothing tells them."""

    def class_name(self, index: int) -> str:
        """The class's name, or its number."""
        return self.class_names[index] if self.class_names else str(index)


def network(given: Path, trust_code: bool = False) -> Network:
    """Load what the user named; what is not there is refused before torch is imported."""
    from robustfpd.cli.targets import trained

    found = trained(given, trust_code)
    from robustfpd.data.class_names import class_names
    from robustfpd.models import load

    model = load(found.source, trust_code=trust_code)
    if found.config is None:
        return Network(found.name, model, None, ())
    data, classes = found.config.data, model.task.num_classes
    names = _recorded(Path(found.source)) or class_names(data, classes)
    return Network(found.name, model, data, names if len(names) == classes else ())


def _recorded(folder: Path) -> tuple[str, ...]:
    """The names that the run wrote down when it read its images; empty where it did not."""
    try:
        return tuple(map(str, json.loads((folder / "environment.json").read_text())["data"]["class_names"]))
    except (OSError, ValueError, LookupError, TypeError):
        return ()
