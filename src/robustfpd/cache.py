"""Where robustfpd keeps what it can make or fetch again: decoded images, downloaded models."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "ROBUSTFPD_CACHE"


def cache_folder() -> Path:
    """Return the folder that ROBUSTFPD_CACHE names, else `robustfpd` in the user's cache folder; it may not exist."""
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "robustfpd"
