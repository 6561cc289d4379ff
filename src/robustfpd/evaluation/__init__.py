"""Robust evaluation: suites of attacks, worst case per image, records."""

from robustfpd.evaluation.doctor import diagnose
from robustfpd.evaluation.evaluator import evaluate
from robustfpd.evaluation.ledger import LedgerRow, OtherEvaluation, is_unfinished
from robustfpd.evaluation.loop import EvaluationObserver, EvaluationProgress
from robustfpd.evaluation.record import AttackResult, Check, EvaluationRecord, Proportion, Verdict, WorstCase
from robustfpd.evaluation.suites import suite_names

__all__ = [
    "AttackResult", "Check", "EvaluationObserver", "EvaluationProgress", "EvaluationRecord", "LedgerRow",
    "OtherEvaluation", "Proportion", "Verdict", "WorstCase", "diagnose", "evaluate", "is_unfinished", "suite_names",
]  # fmt: skip
