"""`robustfpd evaluate`."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from robustfpd.cli.output import Output
from robustfpd.distributed import init_process_group, shared_errors
from robustfpd.errors import InputError

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from torch import nn

    from robustfpd.cli.targets import Subject
    from robustfpd.config import DataConfig, EvaluationConfig, RunConfig, TaskConfig
    from robustfpd.evaluation import EvaluationRecord, Proportion
    from robustfpd.evaluation.suites import AttackSpec

NOT_TRUSTED = 3
"""Exit code under --strict."""
TIMEOUT = timedelta(days=7)
"""How long a rank waits for the others: an attack on a block may take hours on one rank alone."""


def evaluate(
    run: tyro.conf.Positional[Path | None] = None,
    /,
    model: str | None = None,
    eps: tuple[str, ...] = (),
    norm: str | None = None,
    suite: str | None = None,
    num_images: int | None = None,
    surrogate: tuple[str, ...] = (),
    trust_code: bool = False,
    strict: bool = False,
    split: Literal["test", "validation"] = "test",
    space: Literal["pixels", "normalised"] | None = None,
    dataset: str | None = None,
    image_size: int | None = None,
    data_root: str | None = None,
    download: bool = False,
    seed: int | None = None,
    every_attack: bool = False,
    batch_size: int | None = None,
    search_precision: Literal["fp32", "bf16"] = "fp32",
    device: str = "auto",
    dry_run: bool = False,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Attack a classifier: clean and worst-case accuracy over eps with 95 % intervals, and whether to trust them.

    What was found is written as it goes: an evaluation that was killed goes on when the command is repeated. Started
    by torchrun or SLURM, as in `torchrun --nproc-per-node 4 -m robustfpd evaluate ...`, processes share the images.

    For example `robustfpd evaluate runs/digits-mini`, or `robustfpd evaluate runs/folder-mini --suite standard
    --dry-run`, or `robustfpd evaluate mnist/mini-fpd --eps 0.1 --data-root data`, or
    `robustfpd evaluate --model mynets:make --dataset cifar10 --eps 8/255`.

    Args:
        run: a run's folder, a network that comes with robustfpd (see `robustfpd models`), or a folder that model.save
            wrote (then --dataset is needed).
        model: any torch.nn.Module instead, as package.module:factory, images in [0, 1] to logits; --dataset is needed.
        eps: radii of the perturbation in units of the space, for example 0.03 or 8/255; default the recipe's.
        norm: norm of the perturbation, linf, l2 or l1; default the recipe's.
        suite: which attacks: quick, standard (AutoAttack and attacks that know the defence), full, published, ...;
            default the recipe's.
        num_images: how many images; default the recipe's.
        surrogate: networks that attacks are transferred from, named like run or model; the baseline of a network
            that comes with robustfpd joins by itself.
        trust_code: import and run the module that the run's network is made by (model.backbone=package.module:factory);
            only for runs of your own.
        strict: end with exit code 3 unless the verdict is `trusted`.
        split: which images: validation are those held out of training, to choose settings by.
        space: where eps is measured: pixels of [0, 1], or normalised as in the published CALTECH evaluation; default
            the recipe's.
        dataset: images of this data set instead of the run's.
        image_size: pixels a side that --model wants; default the data set's own.
        data_root: folder of images for --dataset folder, else where torchvision keeps its data sets; default the run's.
        download: fetch the data set into --data-root when it is not there.
        seed: seed of the choice of images and of the attacks.
        every_attack: try every attack on every image, for an accuracy per attack; costs more.
        batch_size: images that go through the network at once; default what serves well on a CPU, and on a GPU a
            block (at most 256). Where memory does not suffice it is halved.
        search_precision: what attacks differentiate the network in; with bf16 successes are confirmed in fp32, but the
            number to report is fp32's.
        device: auto, cpu, cuda or mps; of several processes each takes the GPU of its own.
        dry_run: print the attacks and the most time they take, from one timed batch; attack and write nothing.
        json: tell the result as JSON.
        quiet: tell nothing but errors and warnings.
    """
    from robustfpd.cli.common import check_settings, configured, program
    from robustfpd.cli.targets import subject, surrogates
    from robustfpd.device import check_device_name, resolve_device

    group = init_process_group(device, TIMEOUT)
    with shared_errors():
        output = Output(json=json and group.is_main, quiet=quiet or not group.is_main)
        check_device_name(device)
        _check_names(norm, suite, dataset, num_images, image_size, batch_size)
        found = subject(run, model, trust_code)
        config = configured(_settings(found, dataset, image_size), data_root, download, seed)
        plan = _plan(config.evaluation, eps, norm, suite, num_images, space)
        check_settings(config.model_copy(update={"evaluation": plan}))
        if surrogate and plan.space == "normalised":
            raise InputError("--surrogate networks take pixels; they cannot join an evaluation in normalised space")
        others = surrogates(surrogate, found.baseline if plan.space == "pixels" else None, trust_code)
        chosen = resolve_device(device, group.world_size)
        if dry_run:
            if group.is_main:
                _dry_run(output, found, config, plan, split, list(others), chosen, batch_size)
            return
        attacked = _attacked(found, config, plan, split, others, chosen)
    record, path = _evaluated(
        output, found.results, record_name(config.data, plan, split), attacked, suite=plan.suite, eps=plan.eps,
        norm=plan.norm, num_images=plan.num_images, seed=config.seed, every_attack=every_attack,
        batch_size=batch_size or "auto", search_precision=search_precision,
    )  # fmt: skip
    _show(output, record, plan, path)
    told = found.source if found.results == Path(found.source) / "evaluation" else found.results
    output.say(f"next: {program()} report {shlex.quote(str(told))}")
    output.result(_summary(record, path))
    if strict and record.verdict.status != "trusted":
        raise SystemExit(NOT_TRUSTED)


@dataclass(frozen=True)
class _Attacked:
    """What an evaluation is given."""

    shown: str
    """What it is called on screen and in the record."""
    classifier: nn.Module
    data: Any
    surrogates: dict[str, nn.Module]
    class_names: tuple[str, ...]


def _attacked(
    found: Subject, config: RunConfig, plan: EvaluationConfig, split: Literal["test", "validation"],
    others: dict[str, Subject], device: torch.device,
) -> _Attacked:  # fmt: skip
    """Load networks and images."""
    from robustfpd.cli.images import as_made_for, images_of
    from robustfpd.evaluation.normalised_space import in_space

    classifier = found.classifier().to(device)
    images, class_names = images_of(as_made_for(found, config).data, split, found, classifier)
    shown = found.name if split == "test" else f"{found.name} (validation images)"
    shown += " (in normalised space, as published)" if plan.space == "normalised" else ""
    attacked, data = in_space(classifier, images, plan.space)
    networks = {name: other.classifier().to(device) for name, other in others.items()}
    return _Attacked(shown, attacked.to(device), data, networks, tuple(class_names))


def _dry_run(
    output: Output, found: Subject, config: RunConfig, plan: EvaluationConfig, split: str, surrogates: list[str],
    device: torch.device, batch_size: int | None,
) -> None:  # fmt: skip
    """Print the attacks and an upper bound of their time; attack and write nothing."""
    from robustfpd import attacks, data
    from robustfpd.cli.display import duration
    from robustfpd.cli.images import as_made_for

    settings = as_made_for(found, config).data
    counts = data.count(settings)
    available = counts.test if split == "test" else counts.validation
    task, images = found.task or counts.info.task, min(plan.num_images, available)
    specs, forward, gradient = _timed_suite(found.classifier().to(device), task, plan, surrogates, device, batch_size)
    rows, seconds = [], forward * images
    for spec in specs:
        # An attack that searches for the smallest perturbation runs once for all eps.
        radii = 1 if attacks.get(spec.attack).minimal else len(plan.eps)
        each = gradient if attacks.get(spec.attack).access == "gradients" else forward
        spent = spec.iterations * radii * images * each
        rows.append((spec, radii, spent))
        seconds += spent
    path = found.results / f"{record_name(settings, plan, split)}.json"
    output.say(
        f"{found.name}: {images:,} of {available:,} {split} images of {counts.info.name}, {task}",
        f"suite {plan.suite}, {plan.norm}, eps {' '.join(f'{e:.4g}' for e in plan.eps)}",
        _attack_table(rows),
        f"time    at most about {duration(seconds)}, and the checks: an image is not attacked again once",
        "        it is misclassified, so most evaluations take far less",
        f"        timed now on {device}: {1000 * forward:.3g} ms an image, {1000 * gradient:.3g} ms with its gradient",
        f"record  {path}",
        "        an evaluation that is there is resumed or read",
        "dry run: nothing was attacked or written",
    )
    output.result({
        "subject": found.name, "suite": plan.suite, "norm": plan.norm, "eps": list(plan.eps), "split": split,
        "num_images": images, "dataset": counts.info.name, "device": str(device), "path": str(path),
        "attacks": [
            {
                "label": spec.label, "attack": spec.attack, "view": spec.view, "options": dict(spec.options),
                "screened": spec.screened, "radii": radii, "iterations_per_image": spec.iterations,
                "estimated_seconds": round(spent, 1),
            }
            for spec, radii, spent in rows
        ],
        "estimated_seconds": round(seconds, 1), "bound": "upper",
    })  # fmt: skip


def _timed_suite(
    classifier: nn.Module, task: TaskConfig, plan: EvaluationConfig, surrogates: list[str], device: torch.device,
    batch_size: int | None,
) -> tuple[list[AttackSpec], float, float]:  # fmt: skip
    """Return the suite's attacks, and the seconds an image takes forward, and forward and backward, in a batch."""
    import torch

    from robustfpd.attacks.adaptive import LOGITS, adaptive_views
    from robustfpd.attacks.base import preserve_state
    from robustfpd.cli.common import timed
    from robustfpd.evaluation.memory import block_size, found_batch_size
    from robustfpd.evaluation.suites import SuiteContext
    from robustfpd.evaluation.suites import plan as suite_attacks

    images = torch.rand(1, task.in_channels, *task.image_size, device=device)
    count = batch_size or found_batch_size(images, device, block_size(plan.num_images, None))
    images = torch.rand(count, *images.shape[1:], device=device)

    def gradient() -> None:
        images.requires_grad_()
        torch.autograd.grad(classifier(images).sum(), images)

    def forward() -> None:
        with torch.no_grad():
            classifier(images)

    with preserve_state(classifier):
        # In normalised space attacks see the logits only.
        views = adaptive_views(classifier, images[:4]) if plan.space == "pixels" else (LOGITS,)
        seconds = timed(forward, device) / count, timed(gradient, device) / count
    return suite_attacks(plan.suite, SuiteContext(plan.norm, tuple(views), tuple(surrogates))), *seconds


def _attack_table(rows: Sequence[tuple[AttackSpec, int, float]]) -> Table:
    """The attacks in their order, with their options and the time they take at most."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from robustfpd.cli.display import duration

    table = Table("attack", "options", "radii", "iterations", "at most", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for spec, radii, seconds in rows:
        options = {k: v for k, v in spec.options.items() if k != "early_stop" and str(v) not in spec.label}
        shown = " ".join(f"{name}={value}" for name, value in options.items())
        table.add_row(spec.label, shown, str(radii), f"{spec.iterations:,}", duration(seconds))
    return table


def record_name(data: DataConfig, plan: EvaluationConfig, split: str) -> str:
    """What the record is called."""
    source = data.dataset if split == "test" else f"{data.dataset}-{split}"
    return f"{source}-{plan.suite}-{plan.norm}"


def _check_names(
    norm: str | None, suite: str | None, dataset: str | None, num_images: int | None, image_size: int | None,
    batch_size: int | None,
) -> None:  # fmt: skip
    """Refuse what no evaluation can have, before anything is looked for."""
    from robustfpd.cli.common import known
    from robustfpd.config import DATASETS, NORMS, SUITES

    for kind, name, names in (("norm", norm, NORMS), ("suite", suite, SUITES), ("dataset", dataset, DATASETS)):
        if name is not None:
            known(kind, name, names)
    counts = (("--num-images", num_images), ("--image-size", image_size), ("--batch-size", batch_size))
    for flag, number in counts:
        if number is not None and number < 1:
            raise InputError(f"{flag} must be at least 1, found {number}")


def _evaluated(
    output: Output, folder: Path, name: str, attacked: _Attacked, **options: Any
) -> tuple[EvaluationRecord, Path]:
    """Go on with, read, or make the evaluation; another one of that name stays, and this one gets a number."""
    from robustfpd import evaluation
    from robustfpd.cli.display import evaluation_display

    for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))):
        path = folder / f"{name}{suffix}.json"
        unfinished = evaluation.is_unfinished(path)
        done = path.is_file() and not unfinished
        try:
            with evaluation_display(output.console, attacked.shown) as observer:
                record = evaluation.evaluate(
                    attacked.classifier,
                    attacked.data,
                    out_dir=folder,
                    record_name=path.stem,
                    model_name=attacked.shown,
                    observer=observer,
                    surrogates=attacked.surrogates,
                    class_names=attacked.class_names,
                    **options,
                )
        except evaluation.OtherEvaluation:
            continue
        except KeyboardInterrupt:
            output.say(f"what was found is kept in {folder}; repeat the command to go on")
            raise
        if done:
            output.say(f"measured before, read from {path}")
        elif unfinished:
            output.say(f"went on with the unfinished evaluation in {folder}")
        break
    return record, path


def _show(output: Output, record: EvaluationRecord, plan: EvaluationConfig, path: Path) -> None:
    from robustfpd.report.tables import evaluation_table, verdict_text

    output.say(evaluation_table(record))
    if plan.divide_by is not None:
        output.say(_as_divided(record, plan.divide_by))
    output.say(verdict_text(record))
    output.say(f"record: {path}", "        each image and attack beside it as CSV")


def _summary(record: EvaluationRecord, path: Path) -> dict[str, Any]:
    """What was found, for machines; accuracies are fractions."""
    return {
        "model_name": record.model_name, "suite": record.suite, "norm": record.norm, "seed": record.seed,
        "num_images": record.num_images, "clean": _accuracy(record.clean),
        "worst_case": [{"eps": worst.eps, **_accuracy(worst.robust)} for worst in record.worst_case],
        "verdict": {"status": record.verdict.status, "reasons": list(record.verdict.reasons)},
        "forward_passes": record.forward_passes, "backward_passes": record.backward_passes, "path": str(path),
    }  # fmt: skip


def _accuracy(found: Proportion) -> dict[str, Any]:
    return {"accuracy": found.value, **found.model_dump(mode="json")}


def _plan(
    plan: EvaluationConfig, eps: tuple[str, ...], norm: str | None, suite: str | None, num_images: int | None,
    space: str | None,
) -> EvaluationConfig:  # fmt: skip
    """The recipe's evaluation, with what the flags change."""
    chosen = norm or plan.norm
    radii = tuple(_radius(text, chosen) for text in eps)
    if chosen != plan.norm and not radii:
        raise InputError(f"the recipe's eps are {plan.norm} radii; say with --eps which in {chosen}")
    changes = {"eps": radii or plan.eps, "norm": chosen, "suite": suite or plan.suite, "space": space or plan.space}
    return plan.model_copy(update=changes | {"num_images": plan.num_images if num_images is None else num_images})


def _settings(found: Subject, dataset: str | None, image_size: int | None) -> RunConfig:
    """The run's settings, or defaults; with the images of `dataset` where it is given."""
    from robustfpd.config import RunConfig

    if found.config is None and dataset is None:
        raise InputError(f"{found.name} is no run; say which test images with --dataset")
    if image_size is not None and found.task is not None:
        raise InputError(f"--image-size is for --model; {found.name} was made for {found.task}")
    config = found.config or RunConfig()
    changes: dict[str, object] = {} if dataset is None else {"dataset": dataset}
    if image_size is not None:
        changes["image_size"] = (image_size, image_size)
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def _radius(text: str, norm: str) -> float:
    from robustfpd.config import check_eps

    try:
        radius = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise InputError(f"eps must hold numbers such as 0.03 or 8/255, found {text!r}") from None
    return check_eps(radius, norm)


def _as_divided(record: EvaluationRecord, count: int) -> str:
    """The accuracies that the published evaluation would print: counts over a fixed number."""
    robust = "".join(f", {100 * w.robust.count / count:.2f} % at eps {w.eps:.4g}" for w in record.worst_case)
    return (
        f"divided by {count:,} instead of {record.num_images:,} images, as the published evaluation does: "
        f"{100 * record.clean.count / count:.2f} % clean{robust}"
    )
