"""The base of all settings, and norms with their radii."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from robustfpd.errors import InputError

Norm = Literal["linf", "l2", "l1"]

NORMS: tuple[str, ...] = get_args(Norm)


def check_eps(eps: Any, norm: str, name: str = "eps", *, zero: bool = False) -> float:
    """Return the radius `eps` of an Lp ball as a float; 0 only with `zero`.

    Raises:
        InputError: it is not a positive number, or above 1 in linf, where pixels lie in [0, 1].
    """
    if getattr(eps, "ndim", None) == 0:  # scalars of torch and numpy
        eps = eps.item()
    is_number = isinstance(eps, (int, float)) and not isinstance(eps, bool) and math.isfinite(eps)
    if not is_number or eps < 0 or (eps == 0 and not zero):
        raise InputError(f"{name} must be {'0 or ' if zero else ''}a positive number, found {eps!r}")
    if norm == "linf" and eps > 1:
        raise InputError(
            f"{name} must be at most 1 in linf (pixels lie in [0, 1]), found {eps}; 8/255 is eight grey levels"
        )
    return float(eps)


class Config(BaseModel):
    """Base of all settings: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
