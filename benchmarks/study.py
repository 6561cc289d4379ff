"""Compares the FPD with its undefended baseline at equal cost, and writes the tables of docs/study.md and the README.

    python -m benchmarks.study --data-root data                # everything that results/study lacks: many hours
    python -m benchmarks.study --data-root data --only mnist   # networks whose name contains a word
    python -m benchmarks.study --plan                          # what is measured and what is missing
    python -m benchmarks.study --tables                        # only the tables

Each network is trained on one thread by one of three procedures: two-phase training alone, PGD adversarial training
(`madry`), or TRADES with AWP and EMA. The FPD `improved` sets the cost: the others train for as many epochs as give
them the same wall-clock time (measured in turns before the training) or the same number of optimizer steps. Each is
attacked with suite `standard`. A network is one file results/study/DATASET-PROCEDURE-VARIANT-SEED.json with its
settings and its record; networks whose file is there are skipped, and runs in --runs resume, so that the script goes
on where it was stopped. `--part 1/2` and `--part 2/2` share the work between two processes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from scipy import stats

import robustfpd as rf
from benchmarks.tables import replace_between
from robustfpd import data
from robustfpd.config import RunConfig, recipe
from robustfpd.data import ImageSet
from robustfpd.device import resolve_device, resolve_precision
from robustfpd.evaluation import EvaluationRecord, Proportion
from robustfpd.evaluation.ledger import CLEAN
from robustfpd.evaluation.robustness import format_eps
from robustfpd.io import write_json
from robustfpd.provenance import environment
from robustfpd.training import RunFolder
from robustfpd.training.batch_cost import batch_kinds, training_batch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "study"
PAGE = ROOT / "docs" / "study.md"
README = ROOT / "README.md"

HEADLINE, OTHERS = 1000, 500
"""Largest number of test images: for the first seed of `improved` and `baseline`, and for all other networks."""
ROUNDS = 5
"""Rounds of training batches, in turns, whose median ratio of times is the ratio of costs."""

Procedure = Literal["two-phase", "pgd-at", "trades"]
PROCEDURES: dict[Procedure, str] = {
    "two-phase": "Two-phase training alone",
    "pgd-at": "PGD-AT",
    "trades": "TRADES with AWP and EMA",
}
OVERRIDES: dict[Procedure, tuple[str, ...]] = {
    "two-phase": (),
    "pgd-at": ("adversarial.objective=madry", "adversarial.ema=0", "adversarial.awp=0"),
    "trades": ("adversarial.objective=trades", "adversarial.ema=0.995", "adversarial.awp=0.005"),
}


@dataclass(frozen=True)
class Setting:
    """A data set: radii, epochs of the FPD `improved`, numbers of images and seeds."""

    two_phase_eps: float
    """Radius for networks without adversarial training."""
    eps: float
    """Radius of the adversarial training and its evaluation."""
    epochs: dict[Procedure, int]
    images: str
    """Training and test images, in words."""
    folder: str | None = None
    """Folder of images below the data root; None: the data set itself."""
    beta: float = 6.0
    """β of TRADES."""
    seeds: tuple[int, ...] = (0, 1, 2)
    changes: tuple[str, ...] = ()
    """Changes to the recipes."""


IMAGENET = (
    "model.backbone=benchmarks.pretrained:efficientnet_lite0", "model.pretrained=false",
    "model.stages=[blocks.0,blocks.1,blocks.2,blocks.4,blocks.6]",
    "model.mean=[0.498,0.498,0.498]", "model.std=[0.502,0.502,0.502]",
    "data.image_size=96", "data.stored_size=104", "data.test_fraction=0.25",
)  # fmt: skip
"""An EfficientNet-lite0 with ImageNet weights from a package."""
SETTINGS = {
    "digits": Setting(
        0.1, 0.2, {"two-phase": 40, "pgd-at": 40, "trades": 16}, "1,437 and 360 images", beta=3.0
    ),
    "mnist": Setting(0.1, 0.3, {"two-phase": 3, "pgd-at": 2, "trades": 2}, "the whole sets", beta=2.0),
    "fashion_mnist": Setting(0.02, 0.1, {"two-phase": 3, "pgd-at": 2, "trades": 2}, "the whole sets", beta=3.0),
    "svhn": Setting(
        2 / 255, 8 / 255, {"two-phase": 15, "pgd-at": 12, "trades": 10},
        "7,000 and 3,000 images of SVHN's test set", "svhn_png", seeds=(0,),
    ),
    "cifar10": Setting(
        2 / 255, 8 / 255, {"two-phase": 10, "pgd-at": 8, "trades": 6},
        "12,000 training and 4,000 test images of CIFAR-10", "cifar10_png", seeds=(0,),
    ),
    "caltech101": Setting(
        1 / 255, 4 / 255, {"two-phase": 4, "pgd-at": 5, "trades": 4},
        "the first 40 images of each of the 102 folders", seeds=(0,), changes=IMAGENET,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A network and its cost: `own` sets it, `time` and `steps` equal that of the FPD `improved`."""

    name: str
    cost: Literal["own", "time", "steps"]
    protocol: str = "improved"
    defence: Literal["fpd", "none"] = "fpd"
    changes: tuple[str, ...] = ()
    first_seed_only: bool = False


VARIANTS = (
    Variant("improved", "own"),
    Variant("baseline", "time", defence="none"),
    Variant("baseline-steps", "steps", defence="none", first_seed_only=True),
    Variant("corrected", "time", "corrected", first_seed_only=True),
)
PARTS: dict[str, tuple[str, ...]] = {
    "shared-statistics": ("model.pass_statistics=shared",),
    "no-restoration-loss": ("training.alpha_restore=0", "training.alpha_restore_second=0"),
    "front-2": ("model.front_stages=2",),
    "image": ("model.restoration=image",),
    "inner-denoising": ("model.denoise=normalised",),
    "middle": ("model.middle=input",),
    "elu": ("model.activation=elu",),
    "tanh": ("model.head=tanh",),
    "spectral": ("model.head=spectral", "model.lipschitz=10"),
}
ABLATION: dict[Procedure, dict[str, tuple[str, ...]]] = {
    "two-phase": PARTS | {
        "pixel-loss": (
            "training.restoration_unit=space", "training.alpha_restore=1", "training.alpha_restore_second=1",
        ),
        "no-middle-noise": ("training.middle_noise=0",),
        "every-batch": ("training.second_pass_interval=1",),
        "no-start": ("training.restoration_start=0",),
    },
    "trades": PARTS | {
        "features": ("adversarial.alpha_features=0.5",),
        "separate-passes": ("adversarial.batch=both",),
    },
}  # fmt: skip
"""Changes of one part of the FPD `improved`, at equal time."""
ABLATED: tuple[Procedure, ...] = ("two-phase", "trades")
"""Procedures of the ablation, which is on digits."""


Results = dict[tuple[str, Procedure, str], list[dict[str, Any]]]
"""Results by data set, procedure and variant, in the order of the plan."""


@dataclass(frozen=True)
class Network:
    """One training and its evaluation."""

    dataset: str
    procedure: Procedure
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Name of the result file."""
        return f"{self.dataset}-{self.procedure}-{self.variant.name}-{self.seed}"

    @property
    def path(self) -> Path:
        """The result file."""
        return RESULTS / f"{self.name}.json"

    @property
    def eps(self) -> float:
        """Radius of the evaluation."""
        setting = SETTINGS[self.dataset]
        return setting.two_phase_eps if self.procedure == "two-phase" else setting.eps

    @property
    def num_images(self) -> int:
        """Number of test images."""
        first = self.seed == SETTINGS[self.dataset].seeds[0]
        return HEADLINE if first and self.variant.name in ("improved", "baseline") else OTHERS


def plan() -> list[Network]:
    """Return all networks, seed by seed: the comparison, then the ablation."""
    comparison = [
        Network(dataset, procedure, variant, seed)
        for dataset, setting in SETTINGS.items()
        for seed in setting.seeds
        for procedure in PROCEDURES
        for variant in VARIANTS
        if seed == setting.seeds[0] or not variant.first_seed_only
    ]
    ablation = [
        Network("digits", procedure, Variant(name, "time", changes=changes), seed)
        for procedure in ABLATED
        for name, changes in ABLATION[procedure].items()
        for seed in SETTINGS["digits"].seeds
    ]
    return sorted([*comparison, *ablation], key=lambda network: network.seed)


def settings(network: Network, data_root: str = "data") -> RunConfig:
    """Return the settings of a network, with the epochs of the FPD `improved`."""
    setting, variant, two_phase = SETTINGS[network.dataset], network.variant, network.procedure == "two-phase"
    section = "training" if two_phase else "adversarial"
    overrides = [
        *OVERRIDES[network.procedure], f"adversarial.beta={setting.beta}", *setting.changes, *variant.changes,
        f"{section}.epochs={setting.epochs[network.procedure]}", f"seed={network.seed}", f"data.root={data_root}",
    ]  # fmt: skip
    if not two_phase:
        overrides.append(f"adversarial.warmup={setting.epochs[network.procedure] / 3:.3g}")
    if setting.folder is not None:
        overrides += ["data.dataset=folder", f"data.root={Path(data_root) / setting.folder}", "data.image_size=32"]
    name = f"{network.dataset}/{'mini' if two_phase else 'robust'}"
    config = recipe(name, [*overrides, f"model.defence={variant.defence}"], protocol=variant.protocol)
    return config.model_copy(update={"model": config.model.baseline()}) if variant.defence == "none" else config


def with_equal_cost(network: Network, config: RunConfig, reference: RunConfig) -> tuple[RunConfig, float | None]:
    """Return the settings with the epochs that give the cost of `reference`, and the ratio of the costs of a batch."""
    if network.variant.cost == "own":
        return config, None
    if network.variant.cost == "steps":
        stage: Literal["training", "adversarial"] = "training" if config.stage == "two-phase" else "adversarial"
        ratio = 1 / reference.steps_per_batch[stage]
    else:
        ratio = time_ratio(config, reference)
    epochs = max(1, round(reference.procedure.epochs / ratio))
    field = "training" if config.stage == "two-phase" else "adversarial"
    update = {"epochs": epochs, "warmup": config.adversarial.warmup * epochs / reference.procedure.epochs}
    procedure = config.procedure.model_copy(update={k: v for k, v in update.items() if hasattr(config.procedure, k)})
    return config.model_copy(update={field: procedure}), ratio


def time_ratio(config: RunConfig, reference: RunConfig) -> float:
    """Return the CPU time of a mean batch of `config` over that of `reference`, as the median of rounds in turns."""
    device = resolve_device("cpu", 1)
    precision = resolve_precision("auto", device)
    task = data.count(reference.data).info.task
    size = 2 * reference.procedure.batch_size
    draws = torch.Generator().manual_seed(0)
    shape = (size, task.in_channels, *task.image_size)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=draws)
    images = ImageSet(pixels, torch.randint(task.num_classes, (size,), generator=draws))
    batches = [
        (batch_kinds(run), training_batch(rf.build(task, run.model).train(), run, images, device, precision))
        for run in (config, reference)
    ]
    ratios = []
    for _ in range(ROUNDS + 1):
        seconds = [0.0, 0.0]
        for which, (kinds, train_batch) in enumerate(batches):
            for epoch, index, share in kinds:
                start = time.process_time()
                train_batch(epoch, index)
                seconds[which] += share * (time.process_time() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])  # the first round warms up


def measure(network: Network, data_root: str, runs: Path) -> dict[str, Any]:
    """Train and attack one network; return the result. An interrupted training or evaluation resumes."""
    folder = RunFolder(runs / network.name)
    if folder.started:
        config = folder.config()
        ratio = json.loads((folder.path / "ratio.json").read_text())
    else:
        reference = settings(Network(network.dataset, network.procedure, VARIANTS[0], network.seed), data_root)
        config, ratio = with_equal_cost(network, settings(network, data_root), reference)
        write_json(folder.path / "ratio.json", ratio)
    result = rf.train(config, folder.path, device="cpu", resume=folder.started)
    test = data.load(config.data).test.floats()
    classifier = result.model.classifier().eval()
    record = rf.evaluate(
        classifier, test, suite="standard", norm="linf", eps=[network.eps],
        num_images=min(network.num_images, len(test[1])), seed=0,
        out_dir=folder.path / "evaluation", model_name=network.name, gallery=0,
    )  # fmt: skip
    wrong = {
        clean: {row.image for row in record.ledger if (row.attack == CLEAN) == clean and row.outcome == "misclassified"}
        for clean in (True, False)
    }
    public = config.data.model_copy(update={"root": "data", "cache": None})
    return {
        "dataset": network.dataset, "procedure": network.procedure, "variant": network.variant.name,
        "seed": network.seed, "cost": network.variant.cost, "cost_of_a_batch": ratio,
        "epochs": config.procedure.epochs, "best_epoch": result.best_epoch + 1,
        "train_seconds": sum(m.seconds for m in result.history), "images": SETTINGS[network.dataset].images,
        "record": record.model_dump(mode="json", exclude={"ledger"}),
        "wrong_clean": sorted(wrong[True]), "wrong_robust": sorted(wrong[True] | wrong[False]),
        "config": config.model_copy(update={"data": public}).model_dump(mode="json"),
        "machine": environment(torch.device("cpu")),
    }  # fmt: skip


def results() -> Results:
    """Return the committed results by data set, procedure and variant, in the order of the plan."""
    found: Results = {}
    for network in plan():
        if network.path.is_file():
            key = (network.dataset, network.procedure, network.variant.name)
            found.setdefault(key, []).append(json.loads(network.path.read_text()))
    return found


def comparison_table(found: Results, procedure: Procedure) -> Iterator[str]:
    """Yield the lines of one procedure's table: the variants of each data set."""
    yield from ("| data set, eps | network | epochs | minutes | images | clean | robust | verdict |", "|" + "---|" * 8)
    for dataset in SETTINGS:
        for variant in VARIANTS:
            rows = found.get((dataset, procedure, variant.name), [])
            if rows:
                cost = ", equal steps" if variant.cost == "steps" else ""
                yield row(f"{dataset}, {_eps(rows[0])}", variant.name.removesuffix("-steps") + cost, rows)


def difference_table(found: Results) -> Iterator[str]:
    """Yield the lines of the table of differences: the FPD `improved` minus its baseline at equal time."""
    yield from ("| data set, eps | procedure | seeds | clean | robust |", "|" + "---|" * 5)
    for dataset in SETTINGS:
        for procedure, title in PROCEDURES.items():
            fpd, baseline = (
                {r["seed"]: r for r in found.get((dataset, procedure, name), [])} for name in ("improved", "baseline")
            )
            pairs = [(fpd[seed], baseline[seed]) for seed in fpd if seed in baseline]
            if pairs:
                clean, robust = (
                    difference([(set(a[key]), set(b[key]), a["record"]["clean"]["total"]) for a, b in pairs])
                    for key in ("wrong_clean", "wrong_robust")
                )
                yield f"| {dataset}, {_eps(pairs[0][0])} | {title} | {len(pairs)} | {clean} | {robust} |"


def difference(pairs: Sequence[tuple[set[int], set[int], int]]) -> str:
    """Return the mean difference of two networks' accuracies on the same images in points, with its 95 % interval.

    The interval is Student's over the seeds; with one seed, that of paired proportions over the images (Agresti & Min,
    Statistics in Medicine 24, 2005, with 1/2 added to each cell).

    Args:
        pairs: for each seed, the images that the first and the second network misclassify, and the number of images.
    """
    differences = [(len(second) - len(first)) / count for first, second, count in pairs]
    mean = statistics.mean(differences)
    if len(pairs) > 1:
        centre = mean
        half = stats.t.ppf(0.975, len(pairs) - 1) * statistics.stdev(differences) / len(pairs) ** 0.5
    else:
        ((first, second, count),) = pairs
        only_second, only_first, total = len(second - first) + 0.5, len(first - second) + 0.5, count + 2
        centre = (only_second - only_first) / total
        half = stats.norm.ppf(0.975) * math.sqrt((only_second + only_first) / total - centre**2) / math.sqrt(total)
    return f"{100 * mean:+.1f} [{100 * (centre - half):+.1f}, {100 * (centre + half):+.1f}]"


def ablation_table(found: Results, procedure: Procedure) -> Iterator[str]:
    """Yield the lines of the table of one ablation: the FPD `improved`, and one change at a time."""
    yield from ("| network | epochs | minutes | images | clean | robust | verdict |", "|" + "---|" * 7)
    for name, changes in ({"improved": (), "baseline": ()} | ABLATION[procedure]).items():
        rows = found.get(("digits", procedure, name), [])
        if rows:
            yield row(", ".join(f"`{change}`" for change in changes) or name, None, rows)


def row(first: str, second: str | None, rows: Sequence[dict[str, Any]]) -> str:
    """Return one line of a table, with accuracies in %."""
    epochs = " or ".join(map(str, sorted({r["epochs"] for r in rows})))
    minutes = statistics.mean(r["train_seconds"] for r in rows) / 60
    records = [EvaluationRecord.model_validate(r["record"]) for r in rows]
    images = " or ".join(f"{n:,}" for n in sorted({r.num_images for r in records}))
    clean, robust = _accuracy([r.clean for r in records]), _accuracy([r.worst_case[-1].robust for r in records])
    verdicts = ", ".join(sorted({r.verdict.status for r in records}))
    names = [first, *([second] if second is not None else [])]
    return f"| {' | '.join([*names, epochs, f'{minutes:.0f}', images, clean, robust, verdicts])} |"


def _accuracy(accuracies: Sequence[Proportion]) -> str:
    """Return the mean ± standard deviation over seeds, or one seed's accuracy [95 % interval over the images], in %."""
    if len(accuracies) == 1:
        return str(accuracies[0]).replace(" %", "")
    values = [100 * accuracy.value for accuracy in accuracies]
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def _eps(result: dict[str, Any]) -> str:
    return format_eps(result["record"]["worst_case"][-1]["eps"])


def write_tables() -> None:
    """Write every table of the page and of the README between its markers."""
    found = results()
    for page in (PAGE, README):
        _write_table(page, "differences", difference_table(found))
    for procedure in PROCEDURES:
        _write_table(PAGE, procedure, comparison_table(found, procedure))
    for procedure in ABLATED:
        _write_table(PAGE, f"ablation of {procedure}", ablation_table(found, procedure))


def _write_table(page: Path, name: str, lines: Iterator[str]) -> None:
    replace_between(page, f"<!-- measured: {name} -->", f"<!-- end of {name} -->", lines)


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="where trainings and ledgers are kept")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th network, from the K-th on")
    parser.add_argument("--plan", action="store_true", help="only list the networks and whether they are measured")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    networks = [network for network in plan() if arguments.only in network.name][part - 1 :: parts]
    if arguments.plan:
        for network in networks:
            print(f"{'measured' if network.path.is_file() else 'missing '}  {network.name}")
        return
    torch.set_num_threads(1)
    for network in () if arguments.tables else networks:
        if not network.path.is_file():
            result = measure(network, arguments.data_root, arguments.runs)
            write_json(network.path, result)
            print(row(network.name, None, [result]), flush=True)
    if parts == 1:
        write_tables()


if __name__ == "__main__":
    main()
