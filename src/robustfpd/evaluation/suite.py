"""Suites: which attacks an evaluation runs, cheap ones first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from robustfpd.attacks import adaptive
from robustfpd.errors import InputError, unknown_name


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


def _pgd(restarts: int, steps: int = 40, **options: Any) -> tuple[Planned, ...]:
    """PGD on the classifier and on its logits before squashing."""
    settings = {"steps": steps, "restarts": restarts, **options}
    name = f"PGD-{steps} {options['loss']}" if "loss" in options else f"PGD-{steps}"
    return (
        Planned(name, "pgd", options=settings),
        Planned(f"{name}, pre-squash", "pgd", adaptive.UNSQUASHED, settings),
    )


def _published(steps: int, step_size: float) -> tuple[Planned, ...]:
    """FGSM and PGD as the authors ran them: on the squashed logits, no random start, steps of one length."""
    return (
        _FGSM[0],
        Planned(
            f"PGD-{steps}, no random start", "pgd",
            options={"steps": steps, "step_size": step_size, "random_start": False},
        ),
    )  # fmt: skip


_SUITES: dict[str, tuple[Planned, ...]] = {
    "first-look": (*_FGSM, *_pgd(restarts=1)),
    "quick": (*_FGSM, *_pgd(restarts=2)),
    "published": _published(steps=40, step_size=2 / 255),  # SVHN and CALTECH
    "published-mnist": _published(steps=100, step_size=0.1),
    "pgd-100": (*_FGSM, *_pgd(restarts=5, steps=100)),
    "thorough": (*_FGSM, *_pgd(restarts=5), *_pgd(restarts=5, loss="margin")),
}


def suite_names() -> list[str]:
    """Names of all suites."""
    return sorted(_SUITES)


def check_suite(name: str) -> None:
    """Raise an InputError for a name that is no suite."""
    if name not in _SUITES:
        raise unknown_name("suite", name, _SUITES)


def plan(suite: str, classifier: nn.Module, norm: str = "linf") -> list[Planned]:
    """Return the attacks of a suite that apply to this classifier.

    Raises:
        InputError: unknown suite, or one whose steps are lengths in another norm.
    """
    check_suite(suite)
    if suite.startswith("published") and norm != "linf":
        raise InputError(f"suite {suite!r} has steps for linf, found norm {norm!r}; use suite quick or thorough")
    offered = adaptive.views(classifier)
    return [planned for planned in _SUITES[suite] if planned.view in offered]
