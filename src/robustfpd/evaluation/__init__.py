"""Robust evaluation: suites of attacks, worst case per image, records."""

from robustfpd.evaluation.record import AttackResult, EvaluationRecord, Proportion, WorstCase
from robustfpd.evaluation.runner import EvaluationObserver, Stage, evaluate
from robustfpd.evaluation.suite import plan, suite_names

__all__ = [
    "AttackResult", "EvaluationObserver", "EvaluationRecord", "Proportion", "Stage", "WorstCase", "evaluate", "plan",
    "suite_names",
]  # fmt: skip
