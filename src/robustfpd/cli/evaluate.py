"""`robustfpd evaluate`."""

from __future__ import annotations

import itertools
import shlex
import time
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from robustfpd.cli.common import RUN, DataFlags, ModelFlag, Output, TrustFlag
from robustfpd.cli.dry_run import dry_run as dry_run_of
from robustfpd.config import SUITES, Norm
from robustfpd.distributed import init_process_group, shared_errors, sigterm_as_interrupt
from robustfpd.errors import InputError

if TYPE_CHECKING:
    import torch

    from robustfpd.config import DataConfig, EvaluationConfig
    from robustfpd.evaluation import EvaluationRecord, Proportion
    from robustfpd.report.paths import Target

SUITE = tyro.conf.arg(constructor=tyro.extras.literal_type_from_choices(SUITES), help_behavior_hint="")


def evaluate(
    run: Annotated[tyro.conf.Positional[Path | None], RUN] = None,
    /,
    model: ModelFlag = None,
    eps: tuple[str, ...] = (),
    norm: Norm | None = None,
    suite: Annotated[str | None, SUITE] = None,
    num_images: int | None = None,
    max_minutes: float | None = None,
    surrogate: tuple[str, ...] = (),
    trust_code: TrustFlag = False,
    strict: bool = False,
    split: Literal["test", "validation"] = "test",
    space: Literal["pixels", "normalised"] | None = None,
    certified_accuracy: tuple[float, ...] = (),
    images: DataFlags = DataFlags(),  # noqa: B008
    seed: int | None = None,
    every_attack: bool = False,
    batch_size: int | None = None,
    search_precision: Literal["fp32", "bf16"] = "fp32",
    device: str = "auto",
    dry_run: bool = False,
    output: Output = Output(),  # noqa: B008
) -> None:
    """Attack a classifier; print clean and robust accuracy over eps with 95 % intervals, and a verdict.

    The output answers two questions: is the model robust, and is the measurement reliable?

    Results are written during the evaluation: repeat the command to resume an interrupted evaluation. With
    torchrun or SLURM, as in `torchrun --nproc-per-node 4 -m robustfpd evaluate ...`, the images are sharded.

    For example `robustfpd evaluate runs/digits-mini`, or `robustfpd evaluate runs/folder-mini --suite standard
    --dry-run`, or `robustfpd evaluate mnist/mini-fpd --eps 0.1 --data-root data`, or
    `robustfpd evaluate --model mynets:make --dataset cifar10 --eps 8/255`.

    Args:
        eps: radii of the perturbation, for example 0.03 or 8/255, or 0 for the clean accuracy; default the recipe's.
        norm: norm of the perturbation; default the recipe's.
        suite: the attacks, standard for a number to report, autoattack to compare with the literature; default the
            recipe's.
        num_images: number of images; default the recipe's; for photographs on a CPU and the suite quick as many of
            these as take about 8 minutes, at least 16.
        max_minutes: end after about this time with what is known; repeat the command with more, or none, to go on.
            Default none; 9 minutes where the number of images depends on the time.
        surrogate: networks from which attacks are transferred, given as for run or model; for a network that comes
            with robustfpd, default its baseline.
        strict: exit with code 3 unless the verdict is `trusted`.
        split: which images; choose settings on validation, the images held out of training.
        space: where eps is measured: pixels of [0, 1], or normalised as in the published CALTECH evaluation; default
            the recipe's.
        certified_accuracy: fraction of images that a certificate proves robust, one that holds at all eps or one for
            each; the verdict is `broken` if attacks leave less.
        seed: seed of the choice of images and of the attacks; default the run's.
        every_attack: run every attack on every image, for an accuracy per attack; more expensive.
        batch_size: images per forward pass; default at most 64 on a CPU, a block (at most 256) on a GPU. It is
            halved when memory runs out.
        search_precision: precision of the attacks' gradients; with bf16, adversarial examples are confirmed in fp32.
            Report results of fp32.
        device: auto, cpu, cuda or mps; with several processes each uses the GPU of its local rank.
        dry_run: print the attacks and an estimate of their time; attacks a few images, for at most about 2 minutes,
            and writes nothing.
    """
    from robustfpd.cli.common import check_settings, named_network
    from robustfpd.config import RunConfig
    from robustfpd.device import check_device_name, resolve_device

    started = time.perf_counter()
    group = init_process_group(device, timedelta(days=7))  # an attack on a block may take hours on one rank alone
    with shared_errors():
        output = output if group.is_main else Output(quiet=True)
        check_device_name(device)
        target = named_network(run, model, trust_code)
        config = target.config or RunConfig()
        data_config = images.config(target)
        plan = _plan(config.evaluation, eps, norm, suite, num_images, space)
        check_settings(config.model_copy(update={"data": data_config, "evaluation": plan}))
        if batch_size is not None and batch_size < 1:
            raise InputError(f"--batch-size must be at least 1, found {batch_size}")
        if max_minutes is not None and not 0 < max_minutes < float("inf"):
            raise InputError(f"--max-minutes must be a number above 0, found {max_minutes}")
        others = _surrogates(surrogate, target, plan, trust_code)
        options = _load(target, data_config, plan, split, others, resolve_device(device, group.world_size))
    options |= plan.model_dump(include={"suite", "eps", "norm", "num_images"}) | {
        "seed": config.seed if seed is None else seed, "every_attack": every_attack,
        "batch_size": batch_size or "auto", "search_precision": search_precision, "max_minutes": max_minutes,
        "certified_accuracy": certified_accuracy or None,
    }  # fmt: skip
    name = _record_name(data_config, plan, split)
    if num_images is None:
        options |= group.broadcast(_fitted(output, options, plan, target.results / f"{name}.json", started))
    if dry_run:
        dry_run_of(output, options, plan, target.results / f"{name}.json", f"{split} images of {data_config.dataset}")
        return
    record, path = _evaluate(output, target.results, name, options)
    _print(output, record, path, plan, target)
    if strict and record.verdict.status != "trusted":
        raise SystemExit(3)


def _fitted(
    output: Output, options: dict[str, Any], plan: EvaluationConfig, path: Path, started: float
) -> dict[str, Any]:
    """Return number of images and time limit where the user gave no number, and print why they are not the recipe's."""
    from robustfpd.cli.image_count import affordable

    count = affordable(options, plan, path, started)
    if count.reason:
        output.print_wrapped(f"{options['model_name']}: {count.reason}")
    return {"num_images": count.num_images, "max_minutes": count.max_minutes or options["max_minutes"]}


def _print(output: Output, record: EvaluationRecord, path: Path, plan: EvaluationConfig, target: Target) -> None:
    """Print tables, verdict and files of an evaluation."""
    from robustfpd.cli.common import program
    from robustfpd.report.metrics import answers_text, evaluation_table

    output.print(evaluation_table(record))
    if plan.divide_by is not None:
        output.print(_divided(record, plan.divide_by))
    output.print(answers_text(record))
    output.print(f"record: {path}", "        each image and attack in the .ledger.csv beside it")
    if not record.complete:
        output.print("partial: repeat the command with a larger --max-minutes to go on where it ended")
    reported = target.path if target.kind == "run" else target.results
    output.print(f"next: {program()} report {shlex.quote(str(reported))}")
    output.print_result(_summary(record, path))


def _surrogates(names: tuple[str, ...], target: Target, plan: EvaluationConfig, trust_code: bool) -> dict[str, Target]:
    """Return the networks that attacks are transferred from, by name: those given, and a zoo network's baseline."""
    from robustfpd.report.paths import resolve_network

    if plan.space == "normalised":
        if names:
            raise InputError("--surrogate networks take pixels; leave them out in normalised space")
        return {}
    known = () if target.baseline is None else (target.baseline,)
    return {name: resolve_network(name, trust_code) for name in (*names, *known)}


def _load(
    target: Target, data_config: DataConfig, plan: EvaluationConfig, split: Literal["test", "validation"],
    surrogates: dict[str, Target], device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Load networks and images; return arguments of `evaluation.evaluate`."""
    from robustfpd.cli.common import load_images
    from robustfpd.evaluation.inputs import in_space

    classifier = target.classifier().to(device)
    images, class_names = load_images(data_config, split, target, classifier)
    name = target.name if split == "test" else f"{target.name} (validation images)"
    name += " (in normalised space, as published)" if plan.space == "normalised" else ""
    attacked, data = in_space(classifier, images, plan.space)
    networks = {surrogate: other.classifier().to(device) for surrogate, other in surrogates.items()}
    return {
        "classifier": attacked.to(device), "data": data, "model_name": name, "surrogates": networks,
        "class_names": class_names,
        "dataset": data_config.dataset if (split, plan.space) == ("test", "pixels") else "",
    }  # fmt: skip


def _record_name(data: DataConfig, plan: EvaluationConfig, split: str) -> str:
    """Return the name of the record's files."""
    source = data.dataset if split == "test" else f"{data.dataset}-{split}"
    return f"{source}-{plan.suite}-{plan.norm}"


def _evaluate(output: Output, folder: Path, name: str, options: dict[str, Any]) -> tuple[EvaluationRecord, Path]:
    """Resume, read, or run the evaluation; if another one has its name, a number is added."""
    from robustfpd import evaluation
    from robustfpd.cli.display import evaluation_display

    for suffix in itertools.chain([""], (f"-{i}" for i in itertools.count(2))):
        path = folder / f"{name}{suffix}.json"
        unfinished = evaluation.is_unfinished(path)
        done = path.is_file() and not unfinished
        try:
            with sigterm_as_interrupt(), evaluation_display(output.console, options["model_name"]) as observer:
                record = evaluation.evaluate(**options, out_dir=folder, record_name=path.stem, observer=observer)
        except evaluation.OtherEvaluation:
            continue
        except KeyboardInterrupt:
            output.print(f"results so far are kept in {folder}; repeat the command to resume")
            raise
        if done:
            output.print(f"evaluated before, read from {path}")
        elif unfinished:
            output.print(f"resumed the unfinished evaluation in {folder}")
        break
    return record, path


def _summary(record: EvaluationRecord, path: Path) -> dict[str, Any]:
    """Return the JSON result; accuracies are fractions."""

    def accuracy(proportion: Proportion) -> dict[str, Any]:
        return {"accuracy": proportion.value, **proportion.model_dump(mode="json")}

    return {
        "model_name": record.model_name, "suite": record.suite, "norm": record.norm, "seed": record.seed,
        "num_images": record.num_images, "complete": record.complete, "clean": accuracy(record.clean),
        "worst_case": [
            {"eps": w.eps, **accuracy(w.robust), **w.model_dump(mode="json", exclude={"eps", "robust"})}
            for w in record.worst_case
        ],
        "headline": record.headline, "robustness": record.robustness.model_dump(mode="json"),
        "verdict": {"status": record.verdict.status, "reasons": list(record.verdict.reasons)},
        "forward_passes": record.forward_passes, "backward_passes": record.backward_passes, "path": str(path),
    }  # fmt: skip


def _plan(
    plan: EvaluationConfig, eps: tuple[str, ...], norm: Norm | None, suite: str | None, num_images: int | None,
    space: str | None,
) -> EvaluationConfig:  # fmt: skip
    """Return the recipe's evaluation, with the changes of the flags."""
    if num_images is not None and num_images < 1:
        raise InputError(f"--num-images must be at least 1, found {num_images}")
    chosen = norm or plan.norm
    radii = tuple(_radius(text, chosen) for text in eps)
    if chosen != plan.norm and not radii:
        raise InputError(f"the recipe's eps are {plan.norm} radii; give --eps in {chosen}")
    return plan.model_copy(update={
        "eps": radii or plan.eps, "norm": chosen, "suite": suite or plan.suite, "space": space or plan.space,
        "num_images": num_images or plan.num_images,
    })  # fmt: skip


def _radius(text: str, norm: str) -> float:
    from robustfpd.config import check_eps

    try:
        radius = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise InputError(f"eps must hold numbers such as 0.03 or 8/255, found {text!r}") from None
    return check_eps(radius, norm, zero=True)


def _divided(record: EvaluationRecord, count: int) -> str:
    """Return the accuracies as the published evaluation prints them: counts over a fixed number."""
    robust = "".join(f", {100 * w.robust.count / count:.2f} % at eps {w.eps:.4g}" for w in record.under_attack)
    return (
        f"divided by {count:,} instead of {record.num_images:,} images, as the published evaluation does: "
        f"{100 * record.clean.count / count:.2f} % clean{robust}"
    )
