"""What the suite `standard` costs beside AutoAttack and the adaptive attacks on every image, in passes.

    python benchmarks/attack_cost.py mnist/mini-baseline --eps 0.1 --num-images 500 --data-root data

The reference runs each member of pyautoattack's `standard` alone on all images, and each adaptive attack of ours alone
on all images; its worst case is over all of them. Images that are misclassified without an attack count as fallen in
both. Prints worst-case accuracies and images forward; writes results/attack_cost/MODEL-EPS.json. Hours for an FPD.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn
from torchvision.datasets import MNIST

import robustfpd as rf
from robustfpd.attacks.query_counter import QueryCounter
from robustfpd.evaluation import suites as suite
from robustfpd.provenance import environment
from robustfpd.rng import generator

MEMBERS = ("apgd-ce", "apgd-t", "fab-t", "square")
BATCH = 100


def autoattack_on_all(
    classifier: nn.Module, images: Tensor, labels: Tensor, eps: float, member: str
) -> tuple[Tensor, int]:
    """Which images withstand one member, and the images it sent forward."""
    counted = QueryCounter(classifier)
    attack = AutoAttack(counted, attacks=[member], norm="Linf", eps=eps, seed=0, version="custom")
    attack.apgd.n_restarts = attack.fab.n_restarts = 1  # as `standard` has it
    found, _ = attack.run_standard_evaluation(images, labels, batch_size=BATCH)
    return _right(classifier, found, labels), counted.forward_passes


def adaptive_on_all(classifier: nn.Module, images: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, int]:
    """Which images withstand every adaptive attack of `standard`, each tried on all, and the images sent forward."""

    def planned(target: suite.SuiteContext) -> list[suite.AttackSpec]:
        return [p for p in suite.suite("standard").attacks(target) if p.view != suite.LOGITS and p.attack != "fab-t"]

    suite._SUITES["adaptive alone"] = suite.Suite(planned, probes=0)
    record = rf.evaluate(classifier, (images, labels), suite="adaptive alone", eps=eps, every_attack=True)
    standing = torch.ones(len(images), dtype=torch.bool)
    standing[[row.image for row in record.ledger if row.outcome == "misclassified"]] = False
    return standing, sum(attack.forward_passes for attack in record.attacks)


@torch.no_grad()
def _right(classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return torch.cat([classifier(x) for x in images.split(BATCH)]).argmax(dim=1) == labels


def main() -> None:
    """Measure one model at one radius."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--eps", type=float, required=True)
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--data-root", default="data")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    test = MNIST(arguments.data_root, train=False)
    chosen = torch.randperm(len(test), generator=generator(0, "images"))[: arguments.num_images].sort().values
    images, labels = (test.data[chosen].float() / 255).unsqueeze(1), test.targets[chosen]
    classifier = rf.load(arguments.model).classifier().eval()
    standing, passes = _right(classifier, images, labels), {}
    for member in MEMBERS:
        kept, passes[member] = autoattack_on_all(classifier, images, labels, arguments.eps, member)
        standing &= kept
    kept, passes["adaptive"] = adaptive_on_all(classifier, images, labels, arguments.eps)
    standing &= kept
    record = rf.evaluate(classifier, (images, labels), suite="standard", eps=arguments.eps)
    reference = {"robust": float(standing.float().mean()), "forward": sum(passes.values()), "members": passes}
    ours = {"robust": record.robust_accuracy, "forward": record.forward_passes, "verdict": record.verdict.status}
    print(f"reference: {reference['robust']:.1%}, {reference['forward']:,} images forward")
    print(f"standard: {ours['robust']:.1%}, {ours['forward']:,}: {ours['forward'] / reference['forward']:.1%}")
    path = Path("results/attack_cost") / f"{arguments.model.replace('/', '-')}-{arguments.eps:g}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"model": arguments.model, "eps": arguments.eps, "num_images": len(images)}
    found = {**settings, "reference": reference, "standard": ours, "environment": environment()}
    path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
