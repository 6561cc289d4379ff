"""Checks entries of the leaderboard: evaluates each network again, and compares with the committed record.

    python -m benchmarks.leaderboard --data-root data                      # every entry whose weights are here
    python -m benchmarks.leaderboard --data-root data --only mnist-fpd     # entries whose name contains a word
    python -m benchmarks.leaderboard --data-root data --add NAME           # write record.json of a new entry

Exits with 1 if a fresh accuracy is outside the committed 95 % interval, or a verdict is not `trusted`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import yaml
from torch import nn

import robustfpd as rf
from benchmarks.reference_networks import NETWORKS, load_network
from robustfpd import data
from robustfpd.config import Norm, parse
from robustfpd.evaluation import EvaluationRecord
from robustfpd.models.import_model import import_model, is_import_path
from robustfpd.report.leaderboard import DESCRIPTION, RECORD, Description, differences, read_entries

FOLDER = Path(__file__).parents[1] / "results" / "leaderboard"


def classifier(description: Description, weights: Path) -> nn.Module:
    """Return the network of an entry in evaluation mode; reference networks are read from `weights`."""
    if description.model in NETWORKS:
        return load_network(description.model, weights)
    if is_import_path(description.model):
        return import_model(description.model, from_cwd=True).eval()
    network: nn.Module = rf.load(description.model).classifier()
    return network.eval()


def evaluate(
    description: Description, *, eps: list[float], num_images: int, data_root: Path, weights: Path,
    suite: str = "standard", norm: Norm = "linf", seed: int = 0,
) -> EvaluationRecord:  # fmt: skip
    """Evaluate the network of an entry on its test images."""
    own = description.data
    config = own.model_copy(update={"root": str(data_root / own.root)})
    images, labels = data.load(config).test.floats()
    return rf.evaluate(
        classifier(description, weights), (images, labels), suite=suite, eps=eps, norm=norm, num_images=num_images,
        seed=seed, model_name=description.model, gallery=0,
    )  # fmt: skip


def main() -> int:
    """Check or add entries; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--weights", type=Path, default=Path("../shared/weights"), help="folder of reference networks")
    parser.add_argument("--only", default="", help="entries whose name contains this")
    parser.add_argument("--add", help="evaluate this new entry and write its record")
    parser.add_argument("--eps", type=float, nargs="+", help="radii of a new entry")
    parser.add_argument("--num-images", type=int, default=1000, help="images of a new entry")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    places = {"data_root": arguments.data_root, "weights": arguments.weights}
    if arguments.add is not None:
        home = FOLDER / arguments.add
        description = parse(Description, yaml.safe_load((home / DESCRIPTION).read_text()), str(home / DESCRIPTION))
        record = evaluate(description, eps=arguments.eps, num_images=arguments.num_images, **places)
        record.save_summary(home / RECORD)
        print(record.headline)
        return 0
    failed = False
    for entry in read_entries(FOLDER):
        old = entry.record
        if arguments.only not in entry.name:
            continue
        if entry.description.model in NETWORKS and not arguments.weights.is_dir():
            print(f"{entry.name}: skipped, its weights are not in {arguments.weights}")
            continue
        fresh = evaluate(
            entry.description, eps=[worst.eps for worst in old.worst_case], num_images=old.num_images, suite=old.suite,
            norm=old.norm, seed=old.seed, **places,
        )  # fmt: skip
        found = differences(old, fresh)
        failed = failed or bool(found)
        print(f"{entry.name}: {'; '.join(found) or f'reproduced, {fresh.worst_case[-1].robust}'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
