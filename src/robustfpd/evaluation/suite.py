"""Suites: which attacks an evaluation runs, cheap ones first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from robustfpd.attacks import adaptive
from robustfpd.errors import unknown_name


@dataclass(frozen=True)
class Planned:
    """One attack of a suite, on one view of the classifier."""

    label: str
    """How records and tables call it, unique in a suite."""
    attack: str
    """Name in the registry."""
    view: str = adaptive.PLAIN
    """Which of `attacks.adaptive.views` it differentiates."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the attack."""


_FGSM = (Planned("FGSM", "fgsm"), Planned("FGSM, pre-squash", "fgsm", adaptive.UNSQUASHED))


def _pgd(restarts: int, **options: Any) -> tuple[Planned, ...]:
    """PGD-40 on the classifier and on its logits before squashing."""
    settings = {"steps": 40, "restarts": restarts, **options}
    name = f"PGD-40 {options['loss']}" if "loss" in options else "PGD-40"
    return (
        Planned(name, "pgd", options=settings),
        Planned(f"{name}, pre-squash", "pgd", adaptive.UNSQUASHED, settings),
    )


_SUITES: dict[str, tuple[Planned, ...]] = {
    "first-look": (*_FGSM, *_pgd(restarts=1)),
    "quick": (*_FGSM, *_pgd(restarts=2)),
    "thorough": (*_FGSM, *_pgd(restarts=5), *_pgd(restarts=5, loss="margin")),
}


def suite_names() -> list[str]:
    """Names of all suites."""
    return sorted(_SUITES)


def check_suite(name: str) -> None:
    """Raise an InputError for a name that is no suite."""
    if name not in _SUITES:
        raise unknown_name("suite", name, _SUITES)


def plan(suite: str, classifier: nn.Module) -> list[Planned]:
    """Return the attacks of a suite that apply to this classifier; an unknown suite is an InputError."""
    check_suite(suite)
    offered = adaptive.views(classifier)
    return [planned for planned in _SUITES[suite] if planned.view in offered]
