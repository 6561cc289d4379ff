"""Cost of the suite `standard` beside AutoAttack on networks with published robust accuracies, in passes.

    python -m benchmarks.attack_cost --side autoattack --weights WEIGHTS --data-root DATA
    python -m benchmarks.attack_cost --side standard --weights WEIGHTS --data-root DATA
    python -m benchmarks.attack_cost

The first two write results/attack_cost/NETWORK.json, in which both sides keep their place. The last prints the table of
all files and writes it to docs/attacks.md, between its marks. AutoAttack takes two hours for all networks on one core,
`standard` a tenth of that.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from pyautoattack import AutoAttack
from torch import Tensor, nn

import robustfpd as rf
from benchmarks.reference_networks import NETWORKS, load_images, load_network
from robustfpd.attacks.base import QueryCounter
from robustfpd.evaluation.robustness import format_eps
from robustfpd.io import write_json
from robustfpd.provenance import environment

FOLDER, PAGE = Path("results/attack_cost"), Path("docs/attacks.md")
MARKS = "<!-- attack cost, by python -m benchmarks.attack_cost -->", "<!-- end of attack cost -->"
BATCH = 250  # AutoAttack's default


def main(
    side: Literal["autoattack", "standard"] | None = None,
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
        run = run_autoattack if side == "autoattack" else run_standard
        path = folder / f"{name.replace('/', '-')}.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        settings = {"network": name, "eps": reference.eps, "num_images": num_images}
        result = run(classifier, images, labels, reference.eps)
        write_json(path, {**found, **settings, side: result | {"environment": environment()}})
        print(name, side, {k: v for k, v in result.items() if k != "robust_images"}, flush=True)

    if side is None:
        text = table(read(folder))
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
        differing = len({*ours["robust_images"]} ^ {*theirs["robust_images"]})
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
        "robust_images": torch.nonzero(robust).flatten().tolist(),
    }  # fmt: skip


def run_standard(classifier: nn.Module, images: Tensor, labels: Tensor, eps: float) -> dict[str, Any]:
    """Return the survivors of the suite `standard`, and its passes and seconds, checks included."""
    start = time.perf_counter()
    record = rf.evaluate(classifier, (images, labels), suite="standard", eps=eps, seed=0)
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
        "robust_images": [i for i in range(len(images)) if i not in found and i not in wrong],
    }  # fmt: skip


def _totals(members: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: round(sum(m[key] for m in members), 1) for key in ("forward", "backward", "seconds")}


if __name__ == "__main__":
    tyro.cli(main)
