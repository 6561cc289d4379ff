"""Cost of the suite `standard` beside AutoAttack on networks with published robust accuracies, in passes.

    python -m benchmarks.attack_cost --side autoattack --weights WEIGHTS --data-root DATA
    python -m benchmarks.attack_cost --side standard --weights WEIGHTS --data-root DATA
    python -m benchmarks.attack_cost --side variants --only trades_mnist_smallcnn --weights WEIGHTS --data-root DATA
    python -m benchmarks.attack_cost

All but the last write results/attack_cost/NETWORK.json, in which each side keeps its place. The last prints the tables
of all files and writes them to docs/attacks.md, between their marks. AutoAttack takes two hours for all networks on one
core, `standard` a tenth of that, as does each variant of it.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from pyautoattack import AutoAttack
from torch import Tensor, nn

import robustfpd as rf
from benchmarks.reference_networks import NETWORKS, load_images, load_network
from robustfpd.attacks.base import QueryCounter
from robustfpd.evaluation import suites
from robustfpd.evaluation.robustness import format_eps
from robustfpd.evaluation.suites import AttackSpec, SuiteContext
from robustfpd.io import write_json
from robustfpd.provenance import environment

FOLDER, PAGE = Path("results/attack_cost"), Path("docs/attacks.md")
MARKS = "<!-- attack cost, by python -m benchmarks.attack_cost -->", "<!-- end of attack cost -->"
BATCH = 250  # AutoAttack's default
Change = Callable[[list[AttackSpec]], list[AttackSpec]]
VARIANTS: dict[str, Change] = {
    "as in `standard`": lambda specs: specs,
    "PGD-20 alone": lambda specs: [s for s in specs if s.attack == "pgd"],
    "PGD-20 and APGD-CE, on all survivors": lambda specs: [
        replace(s, share=1.0) for s in specs if s.attack in ("pgd", "apgd-ce")
    ],
    "without Square": lambda specs: [s for s in specs if s.attack != "square"],
    "without FAB-T": lambda specs: [s for s in specs if s.attack != "fab-t"],
    "APGD-T towards 3 classes": lambda specs: [
        replace(s, options={**s.options, "targets": 3}) if s.attack == "apgd-t" else s for s in specs
    ],
    "shares of a quarter": lambda specs: [replace(s, share=s.share / 4) if s.share < 1 else s for s in specs],
}
"""Changes of the attacks of `standard`, one at a time."""


def main(
    side: Literal["autoattack", "standard", "variants"] | None = None,
    only: str = ",".join(NETWORKS),
    num_images: int = 500,
    weights: Path = Path("weights"),
    data_root: Path = Path("data"),
    folder: Path = FOLDER,
) -> None:
    """Measure one side of the comparison, or write the table of what is measured.

    Args:
        side: what to run; None writes the table.
        only: names of networks, separated by commas.
        num_images: test images per network, drawn as `evaluate` draws them with seed 0.
        weights: folder of the reference networks' safetensors files.
        data_root: folder of the data sets.
        folder: folder of the results.
    """
    torch.set_num_threads(1)
    for name in only.split(",") if side else ():
        reference = NETWORKS[name]
        classifier = load_network(name, weights)
        images, labels = load_images(reference.dataset, data_root, num_images)
        run = {"autoattack": run_autoattack, "standard": run_standard, "variants": run_variants}[side or ""]
        path = folder / f"{name.replace('/', '-')}.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        settings = {"network": name, "eps": reference.eps, "num_images": num_images}
        result = run(classifier, images, labels, reference.eps)
        write_json(path, {**found, **settings, side: result | {"environment": environment()}})
        print(name, side, {k: v for k, v in result.items() if not k.endswith("images")}, flush=True)

    if side is None:
        text = f"{table(read(folder))}\n\n{variants_table(read(folder))}"
        print(text)
        before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
        PAGE.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


def read(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Return the results of networks for which both sides are measured, in the order of `NETWORKS`."""
    files = (folder / f"{name.replace('/', '-')}.json" for name in NETWORKS)
    results = [json.loads(file.read_text()) for file in files if file.is_file()]
    return [r for r in results if "autoattack" in r and "standard" in r]


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table: accuracies, passes per image, ratio, seconds, and survivors that differ."""
    lines = [
        "| network, L∞ | images | robust, AutoAttack / `standard` | survivors that differ | passes per image, forward "
        "+ backward, AutoAttack / `standard` | ratio | seconds, AutoAttack / `standard` |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios = []
    for result in results:
        ours, theirs, count = result["standard"], result["autoattack"], result["num_images"]
        differing = len(_images(ours) ^ _images(theirs))
        totals = [side["forward"] + side["backward"] for side in (theirs, ours)]
        ratios.append(totals[0] / totals[1])
        passes = " / ".join(f"{s['forward'] / count:,.0f} + {s['backward'] / count:,.0f}" for s in (theirs, ours))
        eps = format_eps(result["eps"])
        lines.append(
            f"| `{result['network']}`, {eps} | {count} | {theirs['robust'] / count:.1%} / {ours['robust'] / count:.1%} "
            f"| {differing} | {passes} | {ratios[-1]:.1f} | {theirs['seconds']:,.0f} / {ours['seconds']:,.0f} |"
        )
    if ratios:
        lines += ["", f"The median ratio is {statistics.median(ratios):.1f}, the smallest {min(ratios):.1f}."]
    return "\n".join(lines).replace("%", " %")


def variants_table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table: survivors beyond AutoAttack's, and passes per image, of variants by network."""
    shown = [r for r in results if "variants" in r]
    lines = [
        f"| attacks | {' | '.join(r['network'] for r in shown)} |",
        f"|---|{'---|' * len(shown)}",
    ]
    for name in VARIANTS:
        cells = []
        for result in shown:
            variant = result["variants"][name]
            missed = len(_images(variant) - _images(result["autoattack"]))
            passes = (variant["forward"] + variant["backward"]) / result["num_images"]
            cells.append(f"{missed} more, {passes:,.0f} passes")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run_autoattack(classifier: nn.Module, images: Tensor, labels: Tensor, eps: float) -> dict[str, Any]:
    """Return the survivors of AutoAttack `standard`, and the passes and seconds of its members."""
    logging.disable()
    counter, members = QueryCounter(classifier), list[dict[str, Any]]()
    with torch.no_grad():
        robust = torch.cat([classifier(x).argmax(dim=1) for x in torch.split(images, BATCH)]) == labels
    clean = int(robust.sum())
    for member in ("apgd-ce", "apgd-t", "fab-t", "square"):
        attack = AutoAttack(counter, attacks=[member], norm="Linf", eps=eps, seed=0, version="custom")
        attack.apgd.n_restarts = attack.fab.n_restarts = 1  # as version `standard` sets them
        left, start = torch.nonzero(robust).flatten(), time.perf_counter()
        counter.reset()
        adversarial, _ = attack.run_standard_evaluation(images[left], labels[left], batch_size=BATCH)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            predictions = torch.cat([classifier(x).argmax(dim=1) for x in torch.split(adversarial, BATCH)])
        robust[left] = predictions == labels[left]
        members.append({
            "member": member, "robust": int(robust.sum()), "forward": counter.forward_passes,
            "backward": counter.backward_passes, "seconds": round(seconds, 1),
        })  # fmt: skip
        print(members[-1], flush=True)
    return {
        "clean": clean, "robust": int(robust.sum()), **_totals(members), "members": members,
        "robust_images": _text(torch.nonzero(robust).flatten().tolist()),
    }  # fmt: skip


def run_variants(classifier: nn.Module, images: Tensor, labels: Tensor, eps: float) -> dict[str, Any]:
    """Return the results of variants of `standard` without checks that run attacks, by name."""
    results = {}
    for name, change in VARIANTS.items():

        def specs(context: SuiteContext, change: Change = change) -> list[AttackSpec]:
            return change(suites.attack_specs("standard", context))

        suites._SUITES["variant"] = suites.Suite(specs, probes=0)
        whole = run_standard(classifier, images, labels, eps, suite="variant")
        results[name] = {key: whole[key] for key in ("robust", "forward", "backward", "robust_images")}
        print(name, results[name]["robust"], results[name]["forward"] + results[name]["backward"], flush=True)
    return results


def run_standard(
    classifier: nn.Module, images: Tensor, labels: Tensor, eps: float, suite: str = "standard"
) -> dict[str, Any]:
    """Return the survivors of the suite `standard`, and its passes and seconds, checks included."""
    start = time.perf_counter()
    record = rf.evaluate(classifier, (images, labels), suite=suite, eps=eps, seed=0)
    seconds = time.perf_counter() - start
    found = {row.image for row in record.ledger if row.outcome == "misclassified"}
    wrong = {row.image for row in record.ledger if row.attack == "clean" and row.label != row.clean_prediction}
    members = [
        {"member": a.attack, "attacked": a.attacked, "found": a.misclassified, "forward": a.forward_passes,
         "backward": a.backward_passes, "seconds": round(a.seconds, 1)}
        for a in record.attacks
    ]  # fmt: skip
    return {
        "clean": record.clean.count, "robust": record.worst_case[-1].robust.count,
        "forward": record.forward_passes, "backward": record.backward_passes, "seconds": round(seconds, 1),
        "verdict": record.verdict.status, "reasons": list(record.verdict.reasons), "members": members,
        "checks": record.check_forward_passes + record.check_backward_passes,
        "robust_images": _text(i for i in range(len(images)) if i not in found and i not in wrong),
    }  # fmt: skip


def _text(indices: Iterable[int]) -> str:
    """Return indices on one line."""
    return " ".join(map(str, indices))


def _images(side: dict[str, Any]) -> set[str]:
    return {*side["robust_images"].split()}


def _totals(members: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: round(sum(m[key] for m in members), 1) for key in ("forward", "backward", "seconds")}


if __name__ == "__main__":
    tyro.cli(main)
