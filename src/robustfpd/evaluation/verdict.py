"""Check and Verdict: whether a robust accuracy can be trusted, and why not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from robustfpd.config import Config

CheckOutcome = Literal["passed", "suspicious", "failed", "skipped"]
Status = Literal["trusted", "suspect", "broken"]


class Check(Config):
    """Result of one check of an evaluation or of the doctor; `docs/checks.md` explains each by name."""

    name: str
    outcome: CheckOutcome
    """`suspicious`: a stronger attack would probably find more, or the number may mislead; `failed`: the number means
    nothing; `skipped`: there is nothing to measure, or another check must pass first."""
    evidence: str
    """What was measured, in words and numbers."""
    fix: str = ""
    """What to do, with the code to write; empty unless suspicious or failed."""
    values: Mapping[str, float] = {}
    """The measured numbers by name."""


class Verdict(Config):
    """Conclusion from all checks of an evaluation."""

    status: Status
    """`broken` if a check failed, `suspect` if one is suspicious, `trusted` otherwise."""
    reasons: tuple[str, ...] = ()
    """Evidence of the checks that failed, then of those that are suspicious."""
    checks: tuple[Check, ...] = ()

    @classmethod
    def of(cls, checks: Sequence[Check]) -> Verdict:
        """Return the verdict that follows from `checks`."""
        failed = [c for c in checks if c.outcome == "failed"]
        suspicious = [c for c in checks if c.outcome == "suspicious"]
        status: Status = "broken" if failed else "suspect" if suspicious else "trusted"
        reasons = tuple(f"{c.name}: {c.evidence}" for c in (*failed, *suspicious))
        return cls(status=status, reasons=reasons, checks=tuple(checks))
