"""Whether a robust accuracy can be trusted, and why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from robustfpd.config import Config

Outcome = Literal["passed", "suspicious", "failed", "skipped"]
Status = Literal["trusted", "suspect", "broken"]


class Check(Config):
    """One check with its evidence; `docs/checks.md` explains each by name."""

    name: str
    outcome: Outcome
    """`suspicious`: a stronger attack would probably find more; `failed`: the number means nothing."""
    evidence: str
    """What was seen, in plain words and numbers."""
    values: Mapping[str, float] = {}
    """The numbers."""


class Verdict(Config):
    """What all checks say together."""

    status: Status
    """`trusted`; `suspect` where a check is suspicious; `broken` where one failed."""
    reasons: tuple[str, ...] = ()
    """Why it is not trusted, gravest first."""
    checks: tuple[Check, ...] = ()

    @classmethod
    def of(cls, checks: Sequence[Check]) -> Verdict:
        """Draw the conclusion."""
        grave = [c for c in checks if c.outcome == "failed"]
        doubtful = [c for c in checks if c.outcome == "suspicious"]
        status: Status = "broken" if grave else "suspect" if doubtful else "trusted"
        reasons = tuple(f"{c.name}: {c.evidence}" for c in (*grave, *doubtful))
        return cls(status=status, reasons=reasons, checks=tuple(checks))
