"""Accuracy and time under options of training that change the arithmetic, on a short MNIST `mini`.

    python benchmarks/training_options.py --data-root data --seeds 3

Each option trains mnist/mini on 20,000 images for 2 epochs, on one thread, from several seeds; then all test images are
classified, and some attacked by PGD-20 on the pre-tanh logits. Writes results/training_options/mini.json after each
run, and resumes where it was stopped. The options do not run in turns here: for times see `python -m benchmarks`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import robustfpd as rf
from robustfpd import data
from robustfpd.attacks import adaptive
from robustfpd.config import Precision, recipe
from robustfpd.provenance import environment

RESULTS = Path("results/training_options/mini.json")
OPTIONS: dict[str, tuple[Precision, list[str]]] = {
    "fp32": ("fp32", []),
    "bf16": ("bf16", []),
    "bf16, joint": ("bf16", ["training.second_pass=joint"]),
    "bf16, second_pass_interval 2": ("bf16", ["training.second_pass_interval=2"]),
}
EPS, STEPS = 0.1, 20


def measure(option: str, seed: int, root: str, attacked: int) -> dict[str, Any]:
    """Train once; return accuracies as fractions and seconds of training."""
    precision, settings = OPTIONS[option]
    short = [*settings, f"seed={seed}", "training.epochs=2", "data.train_limit=20000", f"data.root={root}"]
    config = recipe("mnist/mini", short, protocol="corrected")
    with tempfile.TemporaryDirectory() as folder:
        result = rf.train(config, Path(folder) / "run", device="cpu", precision=precision)
    images, labels = data.load(config.data).test.floats()
    views = adaptive.views(result.model.classifier())
    clean = classify(result.model.classifier(), images)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:attacked]
    x, y = images[chosen], labels[chosen]
    adversarial = torch.cat([
        rf.attacks.pgd(views["pre-squash"], a, b, eps=EPS, norm="linf", steps=STEPS)
        for a, b in zip(torch.split(x, 100), torch.split(y, 100), strict=True)
    ])  # fmt: skip
    robust = (classify(result.model.classifier(), adversarial) == y) & (clean[chosen] == y)
    return {
        "option": option, "seed": seed, "clean": float((clean == labels).float().mean()),
        "robust": float(robust.float().mean()), "attacked": attacked,
        "seconds": sum(epoch.seconds for epoch in result.history),
    }  # fmt: skip


@torch.no_grad()
def classify(classifier: torch.nn.Module, images: Tensor) -> Tensor:
    """Return predicted classes, N."""
    return torch.cat([classifier(x).argmax(dim=1) for x in torch.split(images, 500)])


def main() -> None:
    """Measure what the result file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--attacked", type=int, default=500)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.is_file() else []
    for option, seed in sorted(itertools.product(OPTIONS, range(given.seeds)), key=lambda run: "," in run[0]):
        if any((run["option"], run["seed"]) == (option, seed) for run in runs):
            continue
        runs.append(measure(option, seed, given.data_root, given.attacked))
        print(json.dumps(runs[-1]), flush=True)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        settings = {"train_limit": 20000, "epochs": 2, "eps": EPS, "norm": "linf", "steps": STEPS}
        RESULTS.write_text(json.dumps({**settings, "environment": environment(), "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
