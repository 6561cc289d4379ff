"""Cost of the suite `standard` relative to AutoAttack and the adaptive attacks on every image, in passes.

    python benchmarks/attack_cost.py mnist/mini-baseline --eps 0.1 --num-images 500 --data-root data

The reference runs each member of pyautoattack's `standard` and each of our adaptive attacks alone on all images; its
worst case is over all of them. Images that are misclassified without an attack are not robust in both. Prints
worst-case accuracies and forward passes; writes results/attack_cost/MODEL-EPS.json. Takes hours for an FPD.
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
from robustfpd.attacks.adaptive import LOGITS
from robustfpd.attacks.base import QueryCounter
from robustfpd.evaluation import suites as suite
from robustfpd.provenance import environment
from robustfpd.rng import generator

MEMBERS = ("apgd-ce", "apgd-t", "fab-t", "square")
BATCH = 100


def autoattack_on_all(
    classifier: nn.Module, images: Tensor, labels: Tensor, eps: float, member: str
) -> tuple[Tensor, int]:
    """Return which images are robust to one member, and its forward passes."""
    counter = QueryCounter(classifier)
    attack = AutoAttack(counter, attacks=[member], norm="Linf", eps=eps, seed=0, version="custom")
    attack.apgd.n_restarts = attack.fab.n_restarts = 1  # as `standard` has it
    adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=BATCH)
    return _correct(classifier, adversarial, labels), counter.forward_passes


def adaptive_on_all(classifier: nn.Module, images: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, int]:
    """Return which images are robust to all adaptive attacks of `standard`, each run on all, and the forward passes."""

    def specs(target: suite.SuiteContext) -> list[suite.AttackSpec]:
        return [p for p in suite.suite("standard").attacks(target) if p.view != LOGITS and p.attack != "fab-t"]

    suite._SUITES["adaptive alone"] = suite.Suite(specs, probes=0)
    record = rf.evaluate(classifier, (images, labels), suite="adaptive alone", eps=eps, every_attack=True)
    robust = torch.ones(len(images), dtype=torch.bool)
    robust[[row.image for row in record.ledger if row.outcome == "misclassified"]] = False
    return robust, sum(attack.forward_passes for attack in record.attacks)


@torch.no_grad()
def _correct(classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return torch.cat([classifier(x) for x in torch.split(images, BATCH)]).argmax(dim=1) == labels


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
    robust, passes = _correct(classifier, images, labels), {}
    for member in MEMBERS:
        survivors, passes[member] = autoattack_on_all(classifier, images, labels, arguments.eps, member)
        robust &= survivors
    survivors, passes["adaptive"] = adaptive_on_all(classifier, images, labels, arguments.eps)
    robust &= survivors
    record = rf.evaluate(classifier, (images, labels), suite="standard", eps=arguments.eps)
    reference = {"robust": float(robust.float().mean()), "forward": sum(passes.values()), "members": passes}
    ours = {"robust": record.robust_accuracy, "forward": record.forward_passes, "verdict": record.verdict.status}
    total = sum(passes.values())
    print(f"reference: {reference['robust']:.1%}, {total:,} images forward")
    print(f"standard: {ours['robust']:.1%}, {record.forward_passes:,}: {record.forward_passes / total:.1%}")
    path = Path("results/attack_cost") / f"{arguments.model.replace('/', '-')}-{arguments.eps:g}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {"model": arguments.model, "eps": arguments.eps, "num_images": len(images)}
    values = {**settings, "reference": reference, "standard": ours, "environment": environment()}
    path.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
