"""Measures the effect of each difference between the protocols on MNIST mini, and writes docs/protocols.md's table.

    python -m benchmarks.protocols --data-root data             # everything: about 40 minutes on one core
    python -m benchmarks.protocols --data-root data --only gate  # variants whose name contains a word
    python -m benchmarks.protocols --table                      # only the table, from results/protocols

Each variant is a shorter mini recipe with one field changed; the adversarial ones start from the corrected two-phase
network. Each writes one result file into results/protocols.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.tables import replace_between

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "protocols"
PAGE = ROOT / "docs" / "protocols.md"
BEGIN, END = "<!-- measured: benchmarks/protocols.py --table -->", "<!-- end -->"

RECIPE = "mnist/mini"
SHORTER = (
    "data.train_limit=6000", "training.epochs=2", "training.batch_size=32", "training.optimizer.lr=0.005",
    "adversarial.epochs=1", "adversarial.batch_size=32", "adversarial.warmup=0.5", "adversarial.start_epoch=0",
    "adversarial.select_images=200",
)  # fmt: skip
NUM_IMAGES = 200
EPS = {"two-phase": 0.1, "adversarial": 0.3}
MNIST_STATISTICS = ("model.mean=[0.1307]", "model.std=[0.3081]")


@dataclass(frozen=True)
class Variant:
    """The corrected mini with some fields changed."""

    name: str
    stage: str
    changes: tuple[str, ...] = ()
    protocol: str = "corrected"
    weights: str | None = None
    """Name of the variant whose network is evaluated, where only the evaluation differs."""


VARIANTS = (
    Variant("corrected", "two-phase"),
    Variant("gate", "two-phase", ("training.gate_trains=upscaling",)),
    Variant("second-pass", "two-phase", ("training.second_pass=through",)),
    Variant("pyramid", "two-phase", ("model.pyramid_reads=raw",)),
    Variant("selection", "two-phase", ("data.selection=test",)),
    Variant("suite", "two-phase", ("evaluation.suite=published-mnist",), weights="corrected"),
    Variant("published", "two-phase", protocol="published"),
    Variant("statistics", "two-phase", MNIST_STATISTICS),
    Variant("statistics-space", "two-phase", (*MNIST_STATISTICS, "training.space=normalised", "model.normalise=once")),
    Variant("statistics-attack", "two-phase", (*MNIST_STATISTICS, "evaluation.space=normalised"), weights="statistics"),
    Variant("corrected", "adversarial"),
    Variant("restored-scale", "adversarial", ("adversarial.restored_scale=255",)),
    Variant("target", "adversarial", ("adversarial.restoration_target=input",)),
    Variant("start", "adversarial", ("adversarial.start=scratch",)),
    Variant("view", "adversarial", ("adversarial.view=logits",)),
    Variant("published", "adversarial", protocol="published"),
)  # fmt: skip


def settings(variant: Variant) -> dict[str, Any]:
    """Return all settings of a variant, as stored in its result file."""
    from robustfpd.config import recipe

    config = recipe(RECIPE, [*SHORTER, *variant.changes], protocol=variant.protocol)
    values: dict[str, Any] = config.model_copy(update={"stage": variant.stage}).model_dump(mode="json")
    return values


def measure(variant: Variant, data_root: str, runs: Path) -> dict[str, Any]:
    """Train a variant (or load the network that it shares), attack it, and return the result."""
    import torch

    import robustfpd as rf
    from robustfpd import data
    from robustfpd.config import recipe
    from robustfpd.evaluation.inputs import in_space

    torch.set_num_threads(1)
    overrides = [*SHORTER, f"data.root={data_root}", *variant.changes]
    config = recipe(RECIPE, overrides, protocol=variant.protocol).model_copy(update={"stage": variant.stage})
    folder = runs / variant.stage / (variant.weights or variant.name)
    seconds = 0.0
    if not (folder / "checkpoints" / "best").is_dir():
        starts_from_best = variant.stage == "adversarial" and config.adversarial.start == "best"
        if starts_from_best and not (runs / "two-phase" / "corrected" / "checkpoints").is_dir():
            measure(VARIANTS[0], data_root, runs)
        start = runs / "two-phase" / "corrected" if starts_from_best else None
        result = rf.train(config, folder, start=start, device="cpu")
        seconds = sum(row.seconds for row in result.history)
    classifier, images = in_space(rf.load(folder).classifier(), data.load(config.data).test, config.evaluation.space)
    other_suite = variant.protocol == "published" or any(c.startswith("evaluation.suite=") for c in variant.changes)
    suite = config.evaluation.suite if other_suite else "first-look"
    record = rf.evaluate(
        classifier, images, suite=suite, eps=EPS[variant.stage], num_images=NUM_IMAGES, model_name=variant.name
    )
    return {
        "variant": variant.name, "stage": variant.stage, "recipe": RECIPE, "protocol": variant.protocol,
        "shorter": SHORTER, "changes": variant.changes, "network_of": variant.weights, "train_seconds": seconds,
        "config": settings(variant),
        "record": record.model_dump(mode="json", exclude={"ledger"}),
    }  # fmt: skip


def table(results: Path = RESULTS) -> str:
    """Return the measured effects as Markdown, from the result files."""
    from robustfpd.evaluation import Proportion

    lines = []
    for stage, title in (("two-phase", "Two-phase training"), ("adversarial", "Adversarial training")):
        lines += [f"\n{title}, robust accuracy at eps {EPS[stage]:g}:\n"]
        lines += ["| changed from `corrected` | attacks | clean | robust |", "|---|---|---|---|"]
        for variant in VARIANTS:
            path = results / f"{variant.stage}-{variant.name}.json"
            if variant.stage != stage or not path.is_file():
                continue
            record = json.loads(path.read_text())["record"]
            clean = Proportion(**record["clean"])
            robust = Proportion(**record["worst_case"][-1]["robust"])
            changed = ", ".join(f"`{c}`" for c in variant.changes)
            nothing = "nothing" if variant.protocol == "corrected" else "everything: `--protocol published`"
            lines.append(f"| {changed or nothing} | {record['suite']} | {clean} | {robust} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    from robustfpd.io import write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--runs", type=Path, default=None, help="keep the runs here instead of a temporary folder")
    parser.add_argument("--only", default="", help="variants whose stage-name contains this")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for variant in () if arguments.table else VARIANTS:
            name = f"{variant.stage}-{variant.name}"
            if arguments.only in name:
                result = measure(variant, arguments.data_root, arguments.runs or Path(temporary))
                write_json(RESULTS / f"{name}.json", result)
                print(name, result["record"]["clean"], result["record"]["worst_case"], flush=True)
    replace_between(PAGE, BEGIN, END, [table().strip()])


if __name__ == "__main__":
    main()
