"""Measures what the checks of gradients and the binarisation test see on honest networks and on bad defences.

    python -m benchmarks.check_thresholds --data-root data --weights weights

Writes results/check_thresholds.json and prints the table of docs/checks.md. Networks that cannot be loaded because
their data or weights are missing are an error. Takes about a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tests.evaluation import defences
from torch import Tensor, nn

from benchmarks.honest_networks import HONEST, checked_data
from robustfpd.attacks.adaptive import adaptive_views
from robustfpd.evaluation.attack_runner import AttackRunner
from robustfpd.evaluation.checks import AttackFindings, CheckContext, binarisation, gradients
from robustfpd.evaluation.checks.context import run_check
from robustfpd.evaluation.inputs import EvaluationData
from robustfpd.evaluation.record import Check
from robustfpd.evaluation.suites import SuiteContext, attack_specs, suite
from robustfpd.io import write_json
from robustfpd.provenance import environment

COUNT = 128
"""Images of which those that are classified correctly are used."""
PANEL_EPS = 0.15
Value = Callable[[Mapping[str, float]], float]
MEASURES: dict[str, tuple[str, Value, float, bool]] = {
    "gradient-agreement, worst images": (
        "gradient-agreement", lambda v: max(v["error"], v["error_around"]), gradients.DISAGREEMENT, True,
    ),
    "gradient-agreement, half of the images": (
        "gradient-agreement", lambda v: v["typical_error"], gradients.UNEXPLAINED, True,
    ),
    "gradient-stability": (
        "gradient-stability", lambda v: min(v["cosine"], v["cosine_around"]), gradients.UNSTABLE, False,
    ),
    "rugged-loss": ("rugged-loss", lambda v: v["median_cosine"], gradients.RUGGED, False),
    "binarisation": ("binarisation", lambda v: v["solved"] / v["problems"], binarisation.SOLVED, False),
}  # fmt: skip
"""Check, value, threshold, and whether values above the threshold are suspicious, by name."""


def measure(classifier: nn.Module, data: tuple[Tensor, Tensor], eps: float) -> dict[str, Check]:
    """Run the checks on a classifier in evaluation mode; `rugged-loss` takes every image for a survivor."""
    images, labels = data
    indices = torch.arange(len(images))
    runner = AttackRunner(classifier, EvaluationData(images, labels, indices), torch.device("cpu"), "linf", 0, 64)
    runner.classify(indices)
    runner.set_views(adaptive_views(classifier, images[:4]))
    correct = runner.clean_predictions == labels
    context = CheckContext(runner, correct, [eps], suite("standard").probes)
    specs = attack_specs("standard", SuiteContext("linf", tuple(runner.views)))
    findings = AttackFindings(specs, (), (), correct, torch.zeros(len(images)))
    return {
        "gradient-agreement": run_check("gradient-agreement", lambda: gradients.gradient_agreement(context)),
        "gradient-stability": run_check("gradient-stability", lambda: gradients.gradient_stability(context)),
        "rugged-loss": run_check("rugged-loss", lambda: gradients.rugged_loss(context, findings)),
        "binarisation": run_check("binarisation", lambda: binarisation.binarisation(context, findings)),
    }


def result(classifier: nn.Module, data: tuple[Tensor, Tensor], eps: float, kind: str) -> dict[str, Any]:
    """Return the measured values of one classifier, as stored in JSON."""
    images, labels = data
    start = time.perf_counter()
    with torch.no_grad():
        accuracy = float((classifier(images).argmax(dim=1) == labels).float().mean())
    checks = measure(classifier, data, eps)
    values = {
        name: value(checks[check].values)
        for name, (check, value, _, _) in MEASURES.items()
        if checks[check].outcome != "skipped" and checks[check].values
    }
    outcomes = {name: check.outcome for name, check in checks.items()}
    seconds = round(time.perf_counter() - start, 1)
    return {
        "kind": kind, "eps": eps, "accuracy": accuracy, "values": values, "outcomes": outcomes, "seconds": seconds,
    }  # fmt: skip


def table(honest: Mapping[str, Mapping[str, Any]], bad: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of docs/checks.md."""
    lines = [
        "| measure | honest networks: lowest, median, highest | suspicious | bad defences beyond it |",
        "|---|---|---|---|",
    ]
    for name, (_, _, threshold, above) in MEASURES.items():
        values = _values(honest, name)
        found = [v for v in _values(bad, name) if (v > threshold) == above and v != threshold]
        spread = ", ".join(f"{v:.2f}" for v in (min(values), median(values), max(values)))
        sign = ">" if above else "<"
        check, _, part = name.partition(", ")
        label = f"`{check}`, {part}" if part else f"`{check}`"
        lines.append(f"| {label} | {spread} | {sign} {threshold} | {len(found)} of {len(_values(bad, name))} |")
    return "\n".join(lines)


def _values(results: Mapping[str, Mapping[str, Any]], name: str) -> Sequence[float]:
    return [float(r["values"][name]) for r in results.values() if name in r["values"]]


def main() -> None:
    """Measure, write the JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True, help="folder of the reference networks' weights")
    parser.add_argument("--out", type=Path, default=Path("results/check_thresholds.json"))
    arguments = parser.parse_args()
    honest, bad = dict[str, Any](), dict[str, Any]()
    for name, network in HONEST.items():
        classifier = network.make(arguments.data_root, arguments.weights)
        data = checked_data(network.dataset, arguments.data_root, COUNT)
        honest[name] = result(classifier, data, network.eps, network.kind)
        print(name, honest[name], flush=True)
    for name, defence in defences.BAD.items():
        classifier = defence.make(defences.plain())
        bad[name] = result(classifier.eval(), defences.sample(COUNT), PANEL_EPS, "bad defence")
        print(name, bad[name], flush=True)
    write_json(arguments.out, {"environment": environment(), "honest": honest, "bad": bad})
    print(table(honest, bad))


if __name__ == "__main__":
    main()
