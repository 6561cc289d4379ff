"""Evaluates the networks of the zoo and of the leaderboard again, and compares with their committed records.

    python -m benchmarks.reproduce --data-root data                  # every network whose weights are here
    python -m benchmarks.reproduce mnist/fpd --data-root data        # these networks
    python -m benchmarks.reproduce --data-root data --add NAME --eps 0.3   # write the record of a new entry

Exits with 1 if a fresh accuracy is outside the committed 95 % interval, a verdict is not `trusted`, or files of a named
network are absent.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

import robustfpd as rf
from benchmarks.reference_networks import NETWORKS, load_network
from robustfpd import data
from robustfpd.config import DataConfig, parse
from robustfpd.errors import MissingDataError
from robustfpd.evaluation import EvaluationRecord
from robustfpd.models import zoo
from robustfpd.models.import_model import import_model, is_import_path
from robustfpd.report.leaderboard import (
    DESCRIPTION,
    RECORD,
    Description,
    Entry,
    differences,
    read_entries,
    zoo_entries,
)

ROOT = Path(__file__).parents[1]
LEADERBOARD = ROOT / "results" / "leaderboard"


def load_classifier(model: str, home: Path, weights: Path) -> nn.Module:
    """Return a network in evaluation mode.

    Args:
        model: as in an entry.
        home: folder of the entry, for a module in it.
        weights: folder of the reference networks.

    Raises:
        MissingDataError: the weights of a reference network are not there.
    """
    if model not in zoo.names() and model in NETWORKS:
        if not (weights / f"{model}.safetensors").is_file():
            raise MissingDataError(f"its weights are not in {weights}")
        return load_network(model, weights)
    if is_import_path(model):
        with contextlib.chdir(home):
            network = import_model(model)
        sys.modules.pop(model.partition(":")[0], None)  # another entry may use the same name
        return network.eval()
    network = rf.load(model).classifier()
    return network.eval()


def load_test_images(config: DataConfig, data_root: Path) -> tuple[Tensor, Tensor]:
    """Return the test images and labels of an entry."""
    root = data_root / Path(config.root).name if config.dataset == "folder" else data_root
    images, labels = data.load(config.model_copy(update={"root": str(root), "cache": None})).test.floats()
    return images, labels


def repeat(entry: Entry, data_root: Path, weights: Path) -> EvaluationRecord:
    """Evaluate the network of an entry as its record was."""
    about, old = entry.description, entry.record
    return rf.evaluate(
        load_classifier(about.model, LEADERBOARD / entry.name, weights), load_test_images(about.data, data_root),
        suite=old.suite, norm=old.norm, eps=[worst.eps for worst in old.worst_case], num_images=old.num_images,
        seed=old.seed, model_name=about.model, gallery=0,
    )  # fmt: skip


def add(name: str, eps: list[float], num_images: int, data_root: Path, weights: Path) -> None:
    """Evaluate a new entry by suite `standard` in L∞ and write its record."""
    home = LEADERBOARD / name
    about = parse(Description, yaml.safe_load((home / DESCRIPTION).read_text()), str(home / DESCRIPTION))
    record = rf.evaluate(
        load_classifier(about.model, home, weights), load_test_images(about.data, data_root),
        suite="standard", eps=eps, num_images=num_images, model_name=about.model, gallery=0,
    )  # fmt: skip
    record.save_summary(home / RECORD)
    print(f"{name}: {record.headline}", flush=True)


def main() -> int:
    """Check or add entries; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="networks to evaluate; none evaluates all, and skips absent files")
    parser.add_argument("--data-root", type=Path, default=Path("data"))
    parser.add_argument("--weights", type=Path, default=Path("../shared/weights"), help="folder of reference networks")
    parser.add_argument("--add", help="name of a new entry in results/leaderboard")
    parser.add_argument("--eps", type=float, nargs="+", help="radii of a new entry")
    parser.add_argument("--num-images", type=int, default=1000, help="images of a new entry")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.add is not None:
        add(arguments.add, arguments.eps, arguments.num_images, arguments.data_root, arguments.weights)
        return 0
    entries = [*zoo_entries(ROOT / "models"), *read_entries(LEADERBOARD)]
    unknown = set(arguments.names) - {entry.name for entry in entries}
    if unknown:
        parser.error(f"no entry {', '.join(sorted(unknown))}; known are {', '.join(entry.name for entry in entries)}")
    failed = False
    for entry in entries:
        if arguments.names and entry.name not in arguments.names:
            continue
        try:
            fresh = repeat(entry, arguments.data_root, arguments.weights)
        except MissingDataError as error:
            failed = failed or bool(arguments.names)
            print(f"{entry.name}: skipped, {error}", flush=True)
            continue
        found = differences(entry.record, fresh)
        failed = failed or bool(found)
        print(f"{entry.name}: {'; '.join(found) or f'reproduced, {fresh.worst_case[-1].robust}'}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
