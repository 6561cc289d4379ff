"""Compares the FPD with its undefended baseline after two-phase training alone, at equal cost, and writes the tables.

    python -m benchmarks.defence --data-root data                # everything that results/defence lacks: hours
    python -m benchmarks.defence --data-root data --only mnist   # runs whose name contains a word
    python -m benchmarks.defence --tables                        # only the tables of docs/protocols.md

Each run trains one network on one thread and attacks it: suite `quick`, then APGD-CE and targeted APGD on the images
that survive it. The FPD `improved` sets the cost: the others train for as many epochs as give them the same wall-clock
time (measured in turns before the training) or the same number of optimizer steps. An ablation changes one difference
of `improved` at a time, at equal wall-clock time. Each run writes results/defence/DATASET-VARIANT-SEED.json; runs whose
file is there are skipped, so that the script resumes where it was stopped. `--part 1/2` and `--part 2/2` share the
work between two processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import robustfpd as rf
from robustfpd import data
from robustfpd.attacks.adaptive import PRE_SQUASH, views
from robustfpd.config import RunConfig, recipe
from robustfpd.evaluation import EvaluationRecord
from robustfpd.io import write_json
from robustfpd.provenance import environment
from robustfpd.rng import generator
from robustfpd.training import (
    OptimizerUpdate,
    TrainResult,
    backbone_step,
    baseline_step,
    noisy_images,
    parameter_groups,
    two_phase_step,
)
from robustfpd.training.optim import make_optimizer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "defence"
PAGE = ROOT / "docs" / "protocols.md"
BEGIN, END = "<!-- measured: benchmarks/defence.py --tables -->", "<!-- end of defence -->"

NUM_IMAGES = 500
SEEDS = (0, 1, 2)
ROUNDS = 7
"""Rounds of training steps, in turns, whose median ratio of times is the ratio of costs."""


@dataclass(frozen=True)
class Setting:
    """A data set: its recipe, the changes to it, and the radii of the attacks."""

    recipe: str
    changes: tuple[str, ...]
    eps: tuple[float, ...]


SETTINGS = {
    "digits": Setting("digits/mini", (), (0.05, 0.1, 0.15)),
    "mnist": Setting("mnist/mini", ("data.train_limit=20000",), (0.1, 0.115)),
    "fashion_mnist": Setting("fashion_mnist/mini", ("data.train_limit=20000", "training.noise=0.1"), (0.02, 0.03)),
}


@dataclass(frozen=True)
class Variant:
    """A network and its cost: `own` sets it, `time` and `steps` equal that of the FPD `improved`."""

    name: str
    cost: Literal["own", "time", "steps"]
    protocol: str = "improved"
    baseline: bool = False
    changes: tuple[str, ...] = ()
    noise: float = 1.0
    """Factor of the training noise: a baseline with more noise is another way to trade clean accuracy for robust."""


VARIANTS = (
    Variant("improved", "own"),
    Variant("baseline", "time", baseline=True),
    Variant("baseline-steps", "steps", baseline=True),
    Variant("corrected", "time", "corrected"),
    Variant("corrected-steps", "steps", "corrected"),
)
MORE_NOISE = (
    Variant("improved-more-noise", "time", noise=1.5),
    Variant("baseline-more-noise", "time", baseline=True, noise=1.5),
)
ABLATION = (
    Variant("image", "time", changes=("model.restoration=image",)),
    Variant("inner-denoising", "time", changes=("model.denoise=normalised",)),
    Variant("denoising", "time", changes=("model.denoise=normalised", "model.middle=input")),
    Variant("elu", "time", changes=("model.activation=elu",)),
    Variant("pooling", "time", changes=("model.tail=pooling",)),
    Variant("tanh", "time", changes=("model.head=tanh",)),
    Variant("front-2", "time", changes=("model.front_stages=2",)),
    Variant("full-front", "time", changes=("model.front_stages=null",)),
    Variant("no-middle-noise", "time", changes=("training.middle_noise=0",)),
    Variant(
        "pixel-loss", "time",
        changes=("training.restoration_unit=space", "training.alpha_restore=1", "training.alpha_restore_second=1"),
    ),
    Variant("every-batch", "time", changes=("training.second_pass_interval=1",)),
    Variant("no-start", "time", changes=("training.restoration_start=0",)),
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training and evaluation."""

    dataset: str
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Name of the result file."""
        return f"{self.dataset}-{self.variant.name}-{self.seed}"

    @property
    def path(self) -> Path:
        """The result file."""
        return RESULTS / f"{self.name}.json"


def plan() -> list[Run]:
    """Return all runs, the comparison first; the ablation is on digits."""
    parts = ((VARIANTS, tuple(SETTINGS)), (ABLATION, ("digits",)), (MORE_NOISE, tuple(SETTINGS)))
    return [
        Run(dataset, variant, seed)
        for variants, datasets in parts
        for seed in SEEDS
        for dataset in datasets
        for variant in variants
    ]


def settings(run: Run, data_root: str = "data") -> RunConfig:
    """Return the settings of a run, with the epochs of the FPD `improved`."""
    setting = SETTINGS[run.dataset]
    overrides = [*setting.changes, *run.variant.changes, f"seed={run.seed}", f"data.root={data_root}"]
    config = recipe(setting.recipe, overrides, protocol=run.variant.protocol)
    factor, noise, middle = run.variant.noise, config.training.noise, config.training.middle_noise
    changed = {"noise": factor * noise, "middle_noise": None if middle is None else factor * middle}
    training = config.training.model_copy(update=changed)
    model = config.model.baseline() if run.variant.baseline else config.model
    return config.model_copy(update={"model": model, "training": training})


def with_equal_cost(run: Run, config: RunConfig, reference: RunConfig) -> tuple[RunConfig, float | None]:
    """Return the settings with the epochs that give the cost of `reference`, and the ratio of the costs of a batch."""
    if run.variant.cost == "own":
        return config, None
    if run.variant.cost == "steps":
        steps = 1.0 if run.variant.baseline else config.steps_per_batch["training"]
        ratio = steps / reference.steps_per_batch["training"]
    else:
        ratio = time_ratio(config, reference)
    epochs = max(1, round(reference.training.epochs / ratio))
    return config.model_copy(update={"training": config.training.model_copy(update={"epochs": epochs})}), ratio


def time_ratio(config: RunConfig, reference: RunConfig) -> float:
    """Return the CPU time of a mean batch of `config` over that of `reference`, as the median of rounds in turns."""
    images, labels = data.load(reference.data).train.floats(torch.arange(reference.training.batch_size))
    kinds = [batch_kinds(c, images, labels) for c in (config, reference)]
    ratios = []
    for _ in range(ROUNDS + 1):
        seconds = [0.0, 0.0]
        for which, (share, step) in ((i, kind) for i in range(2) for kind in kinds[i]):
            start = time.process_time()
            step()
            seconds[which] += share * (time.process_time() - start)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])  # the first round warms up


def batch_kinds(config: RunConfig, images: Tensor, labels: Tensor) -> list[tuple[float, Callable[[], Any]]]:
    """Return the share of each kind of batch in a training with the gate open, and its step, of a new network."""
    task = data.load(config.data).info.task
    model = rf.build(task, config.model, seed=0).train()
    training = config.training.model_copy(update={"threshold": 1e30})
    update = OptimizerUpdate(make_optimizer(parameter_groups(model), training.optimizer), training.clip_grad_norm)
    draws = generator(0, "time")

    def noisy() -> Tensor:
        return noisy_images(model, images, training, draws)

    def fpd_step(index: int) -> None:
        two_phase_step(model, images, noisy(), labels, update, training, index, draws)

    if config.model.defence != "fpd":
        return [(1.0, lambda: baseline_step(model, noisy(), labels, update, training))]
    steps: list[Callable[[], Any]] = [
        lambda: backbone_step(model, images, noisy(), labels, update, training),
        lambda: fpd_step(1),
        lambda: fpd_step(0),
    ]
    return [kind for kind in zip(training.batch_shares, steps, strict=True) if kind[0] > 0]


def measure(run: Run, data_root: str) -> dict[str, Any]:
    """Train and attack one network; return the result."""
    torch.set_num_threads(1)
    reference = settings(Run(run.dataset, VARIANTS[0], run.seed), data_root)
    config, ratio = with_equal_cost(run, settings(run, data_root), reference)
    result, seconds = train_on_cpu(config)
    images, labels = data.load(config.data).test.floats()
    classifier = result.model.classifier().eval()
    with torch.no_grad():
        predictions = torch.cat([classifier(part).argmax(dim=1) for part in torch.split(images, 500)])
    eps = SETTINGS[run.dataset].eps
    start = time.process_time()
    record = rf.evaluate(classifier, (images, labels), suite="quick", eps=eps, num_images=NUM_IMAGES)
    robust = apgd(classifier, images, labels, record)
    return {
        "dataset": run.dataset, "variant": run.variant.name, "seed": run.seed, "cost": run.variant.cost,
        "cost_of_a_batch": ratio, "epochs": config.training.epochs, "changes": run.variant.changes,
        "protocol": run.variant.protocol, "config": config.model_dump(mode="json", exclude={"data": {"root"}}),
        "train_seconds": seconds, "evaluation_seconds": time.process_time() - start,
        "clean": float((predictions == labels).float().mean()), "test_images": len(labels),
        "attacked": record.num_images, "eps": eps, "robust": robust,
        "robust_quick": [worst.robust.value for worst in record.worst_case],
        "misclassified": {f"{a.attack}, eps {a.eps:g}": a.misclassified for a in record.attacks},
        "verdict": record.verdict.status,
        "checks": {c.name: c.evidence for c in record.verdict.checks if c.outcome not in ("passed", "skipped")},
        "epochs_log": [[m.restoration, m.gate_open, m.validation_accuracy] for m in result.history],
        "machine": environment(torch.device("cpu")),
    }  # fmt: skip


def train_on_cpu(config: RunConfig) -> tuple[TrainResult, float]:
    """Train in float32 in a temporary folder; return the result and the seconds of CPU time."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = rf.train(config, Path(folder) / "run", device="cpu", precision="fp32")
    return result, time.process_time() - start


def apgd(classifier: torch.nn.Module, images: Tensor, labels: Tensor, record: EvaluationRecord) -> list[float]:
    """Return the robust accuracy at each radius after APGD-CE and targeted APGD on the survivors of the suite.

    Where the head is tanh, APGD attacks the logits before it, whose gradients do not vanish.
    """
    attacked = views(classifier).get(PRE_SQUASH, classifier)
    broken: set[int] = set()
    accuracies = []
    rows = record.ledger
    correct = {row.image for row in rows if row.attack == "clean" and row.outcome == "robust"}
    for worst in record.worst_case:
        broken |= {row.image for row in rows if row.outcome == "misclassified" and row.eps <= worst.eps}
        left = sorted(correct - broken)
        for name, options in (("apgd-ce", {"steps": 100}), ("apgd-t", {"steps": 30, "targets": 3})):
            if not left:
                break
            x, y = images[left], labels[left]
            adversarial = rf.attacks.get(name)(
                attacked, x, y, eps=worst.eps, norm="linf", generator=generator(0, name), batch_size=250, **options
            )
            with torch.no_grad():
                wrong = classifier(adversarial).argmax(dim=1) != y
            broken |= {left[i] for i in wrong.nonzero().flatten().tolist()}
            left = sorted(correct - broken)
        accuracies.append(len(left) / record.num_images)
    return accuracies


def tables() -> Iterator[str]:
    """Yield the lines of the tables of docs/protocols.md, and a line on the verdicts, from the result files."""
    everything = []
    for dataset, setting in SETTINGS.items():
        radii = " | ".join(f"eps {eps:g}" for eps in setting.eps)
        yield from ("", f"`{setting.recipe}`:", "", f"| network | epochs | minutes | clean | {radii} |")
        yield "|---" * (4 + len(setting.eps)) + "|"
        for variant in (*VARIANTS, *MORE_NOISE, *ABLATION):
            results = [
                json.loads(run.path.read_text())
                for run in (Run(dataset, variant, seed) for seed in SEEDS)
                if run.path.is_file()
            ]
            everything += results
            if results:
                yield row(variant, results, setting.eps)
    suspect = [result for result in everything if result["verdict"] != "trusted"]
    checks = Counter(check for result in suspect for check in result["checks"])
    reasons = ", ".join(f"`{name}` {count}" for name, count in checks.items())
    yield ""
    yield (
        f"The verdict is not `trusted` for {len(suspect)} of these {len(everything)} networks ({reasons}): stronger "
        "attacks would find more adversarial examples for them."
    )


def row(variant: Variant, results: Sequence[dict[str, Any]], radii: Sequence[float]) -> str:
    """Return one line of a table: means and standard deviations over the seeds, in percent."""
    cost = {"own": "", "time": "", "steps": ", equal steps"}[variant.cost]
    label = ", ".join(f"`{c}`" for c in variant.changes) or variant.name.split("-")[0] + cost
    label += f", {variant.noise:g} times the noise" if variant.noise != 1 else ""
    epochs = " or ".join(map(str, sorted({r["epochs"] for r in results})))
    minutes = statistics.mean(r["train_seconds"] for r in results) / 60
    cells = [mean_and_deviation([100 * r["clean"] for r in results])]
    robust = [dict(zip(r["eps"], r["robust"], strict=True)) for r in results]
    cells += [mean_and_deviation([100 * found[eps] for found in robust]) for eps in radii]
    return f"| {label} | {epochs} | {minutes:.1f} | {' | '.join(cells)} |"


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return `mean ± standard deviation`, or the value itself where there is one."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def replace_between(page: Path, begin: str, end: str, lines: Iterable[str]) -> None:
    """Replace what is between two markers of a page.

    Raises:
        ValueError: the page lacks a marker.
    """
    before, first, rest = page.read_text().partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"{page} lacks the marker {begin if not first else end}")
    page.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n\n{end}{after}")


def main() -> None:
    """Measure what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--part", default="1/1", help="K/N: every N-th run, from the K-th on")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    runs = [run for run in plan() if arguments.only in run.name][part - 1 :: parts]
    for run in () if arguments.tables else runs:
        if not run.path.is_file():
            result = measure(run, arguments.data_root)
            write_json(run.path, result)
            shown = ("clean", "eps", "robust", "verdict", "epochs", "train_seconds", "evaluation_seconds")
            print(run.name, {key: result[key] for key in shown}, flush=True)
    if parts == 1:
        replace_between(PAGE, BEGIN, END, tables())


if __name__ == "__main__":
    main()
